"""Ansible's playbooks on a virtual rack, as a person would run them, and the words of the boards where one fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from virtual_rack import Testbed

ANSIBLE = Path(__file__).parents[1] / "ansible"
PLAYBOOK = Path(sys.executable).with_name("ansible-playbook")
PLAYED_WITHIN_S = 900.0  # on a machine that is busy with other things; half a minute to two where it is not
RECAP = re.compile(r"^(\S+)\s+: ((?:\w+=\d+\s*)+)$", re.MULTILINE)

Recap = Mapping[str, Mapping[str, int]]  # by host: ok, changed, unreachable, failed, skipped, rescued, ignored


def why_no_ansible() -> str | None:
    if PLAYBOOK.exists():
        return None
    return "Ansible is missing: pip install --constraint constraints.txt --editable '.[provisioning]'"


@dataclass(frozen=True)
class Playbooks:
    """Those of this project, for one inventory. `folder` takes what Ansible keeps between two commands."""

    inventory: Path
    folder: Path

    def play(self, name: str, *arguments: str) -> Recap:
        """What its recap counts. Fails with all it printed where the playbook does."""
        process = subprocess.Popen(
            [PLAYBOOK, "-i", self.inventory, name, *arguments], cwd=ANSIBLE, env=self._environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=PLAYED_WITHIN_S)
        finally:
            if process.returncode is None:  # with its workers and their ssh
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        assert process.returncode == 0, f"{name} ended with {process.returncode}:\n{said[-20_000:]}"
        return {host: _counts(text) for host, text in RECAP.findall(said)}

    @property
    def _environment(self) -> Mapping[str, str]:
        own = {"ANSIBLE_HOME": str(self.folder), "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8"}
        return {**os.environ, **own, "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.folder / "cp")}


def _counts(text: str) -> dict[str, int]:
    return {name: int(count) for name, _, count in (pair.partition("=") for pair in text.split())}


@contextmanager
def boards_heard(testbed: Testbed, inventory: Path) -> Iterator[None]:
    """Where something fails in here, the failure says what the boards said last."""
    try:
        yield
    except Exception as error:
        status = testbed.run("rack", "status", "--name", testbed.rack)
        journals = testbed.run("fleet", "logs", "--inventory", inventory, "--lines", "30")
        error.add_note(f"{status.stdout}{status.stderr}\n{journals.stdout[-20_000:]}{journals.stderr}")
        raise
