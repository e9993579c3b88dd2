"""Write roles/jetson_runtime/files/locks/*.txt anew: every wheel of a node, by version and sha256.

    python3.12 ansible/lock.py jetpack7-cp312-aarch64

pip works out the markers of the Python that runs this: run it by the board's version. It downloads metadata only.
What NVIDIA builds for JetPack 6 is on no index that keeps its files: it stands in OUTSIDE, with its sha256, and its URL
in the role's defaults.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ANSIBLE = Path(__file__).parent
LOCKS = ANSIBLE / "roles" / "jetson_runtime" / "files" / "locks"
CONSTRAINTS = ANSIBLE.parent / "constraints.txt"
NODE = ["msgspec", "numba", "numpy", "psutil", "pydantic", "pyzmq", "rich", "safetensors", "typer"]
NODE.append('tomli; python_version < "3.11"')
# torch 2.8 for JetPack 6 was built against NumPy 1, and says what it needs itself.
JETPACK6 = ["numpy==1.26.4", "filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec"]
JTOP = "jetson-stats==7.2.2"  # the first that knows JetPack 7; its service runs from the same wheel as its client
EXTRA = {
    "jetpack6-cp310-aarch64": [*JETPACK6, JTOP],
    "jetpack7-cp312-aarch64": ["torch==2.13.0", JTOP],
    "cpu-cp310-x86_64": [],
    "cpu-cp311-x86_64": [],
}
NEEDS_311 = {"filelock", "networkx"}  # as constraints.txt has them
GLIBC_MINOR = {"cp310": 35, "cp311": 36, "cp312": 39}  # of Ubuntu 22.04, Debian 12, Ubuntu 24.04
OUTSIDE = {
    "jetpack6-cp310-aarch64": {
        "torch==2.8.0": "62a1beee9f2f147076a974d2942c90060c12771c94740830327cae705b2595fc",
    }
}


def resolve(target: str) -> dict[str, str]:
    """`name==version` -> sha256 of every wheel that pip would install on the target."""
    _, python, machine = target.split("-")
    version = f"{python[2]}.{python[3:]}"
    if sys.version_info[:2] != tuple(map(int, version.split("."))):
        sys.exit(f"error: {target}: run this by python{version}, whose markers count")
    given = [name.split("==")[0] for name in EXTRA[target] if "==" in name]
    free = {*given, *(NEEDS_311 if python == "cp310" else ())}
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line.split("==")[0] not in free]
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text("\n".join(lines))
        platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in range(17, GLIBC_MINOR[python] + 1)]
        platforms.append(f"--platform=manylinux2014_{machine}")
        options = ["--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:", f"--python-version={version}"]
        files = ["--target", folder, "--constraint", str(constraints), "--report", str(report)]
        pip = [sys.executable, "-m", "pip", "install"]
        subprocess.run([*pip, *options, *platforms, *files, *NODE, *EXTRA[target]], check=True)
        installs = json.loads(report.read_text())["install"]
    wheels = {}
    for install in installs:
        name = re.sub(r"[-_.]+", "-", install["metadata"]["name"]).lower()
        wheels[f"{name}=={install['metadata']['version']}"] = install["download_info"]["archive_info"]["hashes"][
            "sha256"
        ]
    return wheels | OUTSIDE.get(target, {})


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRA:
        sys.exit(f"error: name one of {', '.join(EXTRA)}")
    target = sys.argv[1]
    lines = [f"# Written by ansible/lock.py {target}: the wheels of a node."]
    lines += [f"{wheel} --hash=sha256:{digest}" for wheel, digest in sorted(resolve(target).items())]
    (LOCKS / f"{target}.txt").write_text("\n".join(lines) + "\n")
    print(f"{LOCKS / target}.txt: {len(lines) - 1} wheels")


if __name__ == "__main__":
    main()
