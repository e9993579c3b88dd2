"""Fetch what a node is installed from into a folder: the wheels of a lock file, and our own package.

    python wheelhouse.py LOCK CACHE SOURCE [--url "torch==2.8.0 @ https://..."] [--only-identity]

Prints one JSON document: `bundle` (an archive of the lock and its wheels), `own` (file name of our wheel), `identity`,
which changes exactly when a node must be installed anew. pip checks every sha256 of the lock. Standard library only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGES = ("testbed", "bs_node", "jetson_node", "firmware_setup")
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")
DIGITS = 16
HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def sources(source: Path) -> list[Path]:
    """Files that our wheel is built from, in one order."""
    inside = [path for package in PACKAGES for path in (source / package).rglob("*") if path.is_file()]
    return sorted(path for path in inside if "__pycache__" not in path.parts) + [source / name for name in BUILT_FROM]


def digest_of(files: list[Path], relative_to: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.relative_to(relative_to)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:DIGITS]


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def build_own(source: Path, folder: Path) -> Path:
    """Our wheel. Built from a copy: a `build` folder left in the tree would get into it."""
    if not any(folder.glob("*.whl")):
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            copy, out = Path(scratch, "source"), Path(scratch, "wheel")
            for file in sources(source):
                target = copy / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
            pip("wheel", "--no-deps", "--wheel-dir", str(out), str(copy))
            folder.mkdir(exist_ok=True)
            built = next(out.glob("*.whl"))
            built.replace(folder / built.name)
    return next(folder.glob("*.whl"))


def fetch(lock: Path, urls: dict[str, str], target: str, folder: Path) -> None:
    """Every wheel of the lock; no index is asked where all are there. `target` is NAME-cp310-aarch64."""
    missing = set(HASH.findall(lock.read_text()))
    for wheel in folder.glob("*.whl"):
        digest = sha256_of(wheel)
        if digest not in missing:  # of an older lock, or damaged
            wheel.unlink()
        missing.discard(digest)
    if not missing:
        return
    _, python, machine = target.rsplit("-", 2)
    lines = [as_url(line, urls) for line in lock.read_text().splitlines() if not line.startswith("#")]
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(17, 40)]
    platforms += [f"--platform=manylinux2014_{machine}", f"--platform=linux_{machine}"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write("\n".join(lines))
        wanted.flush()
        options = ["--require-hashes", "--no-deps", "--only-binary=:all:", "--implementation=cp", f"--abi={python}"]
        options += ["--abi=abi3", "--abi=none", f"--python-version={python[2]}.{python[3:]}", *platforms]
        pip("download", *options, "--find-links", str(folder), "--dest", str(folder), "--requirement", wanted.name)


def pack(bundle: Path, lock: Path, wheels: list[Path]) -> None:
    """One archive to copy to boards; those of this lock with older code go."""
    if bundle.exists():
        return
    for old in bundle.parent.glob(f"{lock.stem}-*.tar*"):
        old.unlink()
    partial = bundle.with_name(f"{bundle.name}.partial")
    with tarfile.open(partial, "w") as archive:
        for file in [lock, *wheels]:
            archive.add(file, file.name)
    partial.replace(bundle)


def as_url(line: str, urls: dict[str, str]) -> str:
    """A line of the lock whose wheel is on no index, with its address."""
    wheel, _, rest = line.partition(" ")
    return f"{wheel.split('==')[0]} @ {urls[wheel]} {rest}" if wheel in urls else line


def pip(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.strip()]
        told = [line for line in lines if not line.startswith(("WARNING", "Exception", " "))]
        sys.exit(f"error: pip {arguments[0]}: {told[-1] if told else done.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--url", action="append", default=[], metavar="NAME==VERSION @ URL")
    parser.add_argument("--only-identity", action="store_true", help="fetch nothing")
    options = parser.parse_args()
    urls = {wheel: url for wheel, _, url in (text.partition(" @ ") for text in options.url)}
    own = digest_of(sources(options.source), options.source)
    folder, own_folder = (options.cache.expanduser() / name for name in (options.lock.stem, f"own-{own}"))
    identity = f"{digest_of([options.lock], options.lock.parent)}-{own}"
    said = {"identity": identity}
    if not options.only_identity:
        folder.mkdir(parents=True, exist_ok=True)
        fetch(options.lock, urls, options.lock.stem, folder)
        wheel, bundle = build_own(options.source, own_folder), folder.parent / f"{options.lock.stem}-{identity}.tar"
        pack(bundle, options.lock, [*sorted(folder.glob("*.whl")), wheel])
        said |= {"bundle": str(bundle), "own": wheel.name}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
