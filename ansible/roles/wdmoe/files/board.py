# Runs on any Python 3, also on those that no module of Ansible runs on.
import json
import pathlib
import platform
import re

path = pathlib.Path("/etc/nv_tegra_release")
text = path.read_text()[:65536] if path.is_file() else ""
found = re.search("^# R([0-9]+) .release., REVISION: ([0-9]+)[.]([0-9]+)", text, re.MULTILINE)
python = ".".join(platform.python_version_tuple()[:2])
print(json.dumps({"python": python, "machine": platform.machine(), "l4t": ".".join(found.groups()) if found else ""}))
