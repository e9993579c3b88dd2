"""What all devices of a virtual rack boot from: one root, built once by debootstrap, and a layer with Python packages.

Both lie in the cache under a name that is a hash of what they were made of. Each is built under another name and
renamed when it is whole, by processes that end with the one that started them, in mount and process namespaces of
their own: a build that was killed leaves no mount behind. Packages already downloaded are used again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.errors import ConfigError
from testbed.fleet.rack_skin import L4T_PACKAGES
from testbed.fleet.rack_system import remove_tree
from testbed.paths import cache_directory

PACKAGES = (
    "acl", "ca-certificates", "chrony", "dbus", "iproute2", "iw", "kmod", "openssh-server", "procps", "python3",
    "python3-apt", "python3-packaging", "python3-venv", "rsync", "sudo", "systemd", "systemd-sysv",
)  # fmt: skip
USER = "jetson"
VENV, WHEELS, SOURCES, COMPILED = (f"/opt/testbed/{name}" for name in ("venv", "wheels", "src", "compiled"))
OWN_PACKAGES = ("testbed", "jetson_node", "firmware_setup")  # what a node needs of this project

# Ends with its parent, sees its own processes only, and its mounts vanish with it.
ALONE = (
    "setpriv", "--pdeathsig", "KILL", "--",
    "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--",
)  # fmt: skip

FINISH = f"""
useradd --create-home --uid 1000 --shell /bin/bash {USER}
echo '{USER} ALL=(ALL) NOPASSWD: ALL' > /etc/sudoers.d/{USER}
chmod 0440 /etc/sudoers.d/{USER}
systemctl mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer
systemctl enable ssh.service
printf 'UseDNS no\\n' > /etc/ssh/sshd_config.d/rack.conf
for package in {" ".join(f"{name}={version}" for name, version in L4T_PACKAGES.items())}; do
    folder=$(mktemp -d)
    mkdir "$folder/DEBIAN"
    control="$folder/DEBIAN/control"
    printf 'Package: %s\\nVersion: %s\\nArchitecture: all\\n' "${{package%%=*}}" "${{package#*=}}" > "$control"
    printf 'Maintainer: nobody\\nDescription: of a virtual board, empty\\n' >> "$control"
    chmod 0755 "$folder"
    dpkg-deb --build "$folder" "$folder.deb"
    dpkg --install "$folder.deb"
    rm -r "$folder" "$folder.deb"
done
rm -f /etc/ssh/ssh_host_*
: > /etc/machine-id
"""


@dataclass(frozen=True)
class Base:
    """A distribution to boot; `python` is its own."""

    name: str
    suite: str
    python: tuple[int, int]
    extra: tuple[str, ...] = ()  # arguments of debootstrap
    keyring: str | None = None  # where this machine's distribution may lack it


BASES = {
    "debian": Base("debian", "bookworm", (3, 11)),
    "ubuntu": Base(  # JetPack 6's userland: Ubuntu 22.04, Python 3.10, systemd 249
        "ubuntu", "jammy", (3, 10), ("--components=main,universe",), "/usr/share/keyrings/ubuntu-archive-keyring.gpg"
    ),
}
Say = Callable[[str], None]


def rack_cache() -> Path:
    return cache_directory() / "rack"


def root_folder(base: Base) -> Path:
    """Where a distribution's root lies once it is built."""
    return rack_cache() / f"{base.suite}-{_digest([base.suite, *PACKAGES, *base.extra, FINISH])}"


def base_root(base: Base, say: Say, mirror: str | None = None, keyring: Path | None = None) -> Path:
    """The root of a distribution, with sshd, a user and the packages of a board; 75 s and 340 MB the first time."""
    folder = root_folder(base)
    if not folder.is_dir():
        if keyring is None and base.keyring is not None:
            keyring = Path(base.keyring)
        if keyring is not None and not keyring.is_file():
            need = f"its archive's keys are not at {keyring}"
            raise ConfigError(f"--base {base.name}: {need}: install ubuntu-keyring, or name them with --keyring FILE")
        debs = rack_cache() / "debs" / base.suite
        debs.mkdir(parents=True, exist_ok=True)
        partial = _clean(folder.with_suffix(".partial"))
        checked = ["--force-check-gpg"] if keyring is None else [f"--keyring={keyring}"]
        command = ["debootstrap", *checked, "--variant=minbase", f"--include={','.join(PACKAGES)}", *base.extra]
        source = [] if mirror is None else [mirror]
        say(f"root of {base.name} {base.suite}, made once")
        _run([*ALONE, *command, f"--cache-dir={debs}", base.suite, str(partial), *source], say, folder.name)
        _in_root(str(partial), FINISH, say, folder.name)
        partial.rename(folder)
    return folder


def wheelhouse(base: Base, say: Say) -> Path:
    """Wheels of what a node needs, for the distribution's Python; pip's own cache makes it quick the second time."""
    wanted = _requirements(base)
    folder = rack_cache() / f"wheels-{base.suite}-{_digest(wanted)}"
    if not folder.is_dir():
        partial = _clean(folder.with_suffix(".partial"))
        version = "{}.{}".format(*base.python)
        say(f"wheels for Python {version}, downloaded once")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version", version]
        _run([*pip, "--dest", str(partial), *wanted], say, folder.name)
        partial.rename(folder)
    return folder


def runtime_layer(base: Base, root: Path, wheels: Path, say: Say) -> Path:
    """A layer over the root with an environment that has all a node needs but this project's packages, and no torch."""
    folder = rack_cache() / f"runtime-{_digest([root.name, wheels.name])}"
    if not folder.is_dir():
        say("environment of a node, installed once")
        partial = _clean(folder.with_suffix(".partial"))
        for part in ("upper", "work", "root"):
            (partial / part).mkdir(parents=True)
        lower = f"lowerdir={root},upperdir={partial}/upper,workdir={partial}/work"
        names = sorted({re.split(r"[-_]", wheel.name)[0] for wheel in wheels.glob("*.whl")})
        packages = " ".join(f"{WHEELS}/{wheel.name}" for wheel in sorted(wheels.glob("*.whl")))
        prepare = f"mount -t overlay layer -o {lower} {partial}/root; mkdir -p {partial}/root{WHEELS}; "
        prepare += f"mount --bind {wheels} {partial}/root{WHEELS}; "
        python = "python{}.{}".format(*base.python)
        paths = f"import os; os.environ.setdefault('NUMBA_CACHE_DIR', '{COMPILED}')\\n{SOURCES}\\n"
        script = f"""python3 -m venv {VENV}
{VENV}/bin/pip install --quiet --no-index --no-deps {packages}
printf "{paths}" > {VENV}/lib/{python}/site-packages/testbed-of-the-host.pth
mkdir -p {SOURCES} {COMPILED}
"""
        say(f"installing {', '.join(names)}")
        _in_root(f"{partial}/root", script, say, folder.name, prepare)
        remove_tree(partial / "work")
        partial.rename(folder)
    return folder / "upper"


def own_sources() -> dict[Path, str]:
    """Where this project's packages lie on this machine, and in a device, where they are to be seen."""
    folder = Path(__file__).parents[2]
    return {folder / name: f"{SOURCES}/{name}" for name in OWN_PACKAGES}


def compiled_loops(layer: Path) -> Path:
    """Loops that one device compiled, for all: the same code on the same processor."""
    folder = rack_cache() / f"compiled-{layer.parent.name}"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o1777)
    return folder


def _requirements(base: Base) -> list[str]:
    """As this machine has them where its Python is no newer than the device's; else as this project asks for them."""
    listed = importlib.metadata.requires("wdmoe-testbed") or []
    plain = [line.split(";")[0].strip() for line in listed if "extra ==" not in line]
    if sys.version_info[:2] > base.python:
        return plain
    names = [re.split(r"[^\w.-]", line)[0] for line in plain]
    return [f"{name}=={importlib.metadata.version(name)}" for name in names if _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # of another Python's
        return False
    return True


def _in_root(root: str, script: str, say: Say, what: str, prepare: str = "") -> None:
    """Run a script inside a root, which needs no services for it."""
    around = f'set -e; {prepare} mount -t proc proc {root}/proc; exec chroot {root} /bin/sh -ec "$1"'
    _run([*ALONE, "sh", "-ec", around, "sh", script], say, what)


def _run(command: Sequence[str], say: Say, what: str) -> None:
    """Run what may take minutes, telling each line it prints. Raises ConfigError with its last words."""
    last: list[str] = []
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", env={**os.environ, **environment, "DEBIAN_FRONTEND": "noninteractive"},
    )  # fmt: skip
    try:
        for line in process.stdout or ():
            say(line.strip())
            last = [*last, line.strip()][-4:]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    if process.returncode != 0:
        words = " ".join(line for line in last if line)
        raise ConfigError(f"testbed rack: {what} could not be made: {words[:400] or 'no reason given'}: try again")


def _clean(folder: Path) -> Path:
    """An empty folder instead of what a killed build left."""
    remove_tree(folder)
    folder.mkdir(mode=0o755, parents=True)
    return folder


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
