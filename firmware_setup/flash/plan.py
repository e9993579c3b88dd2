"""The commands from an unpacked BSP to a board that boots without a screen, and what stands in their way."""

from __future__ import annotations

import platform
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from firmware_setup.flash.boards import TARGETS, RefusedError, Target, conf_of, flash_command
from firmware_setup.flash.usb import UsbBoard
from firmware_setup.l4t import UNKNOWN, jetpack_of, release_of
from firmware_setup.machine import Machine

PASSWORD = "\0password"  # noqa: S105 - stands where the password goes, which no plan holds
LONGEST_PASSWORD = 128
USER = re.compile("[a-z][a-z0-9_-]{0,30}")
HOST_NAME = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class Account:
    """The login of the first boot, made in the root file system before it is flashed."""

    user: str
    host_name: str
    password_file: Path

    def check(self) -> None:
        if not USER.fullmatch(self.user):
            raise RefusedError(f"--user {self.user!r}: lower-case letters, digits, - and _ only, a letter first")
        if not HOST_NAME.fullmatch(self.host_name):
            raise RefusedError(f"--hostname {self.host_name!r}: lower-case letters, digits and - only")

    def password(self) -> str:
        raw = Machine().read(str(self.password_file.absolute()), LONGEST_PASSWORD + 2)
        text = (raw or b"").decode("utf-8", "replace").rstrip("\r\n")
        if not text or len(text) > LONGEST_PASSWORD or not text.isprintable():
            raise RefusedError(
                f"{self.password_file}: must hold the password, one printable line of at most 128 letters"
            )
        return text


@dataclass(frozen=True)
class Plan:
    target: Target
    release: str
    conf: str
    bsp: Path
    steps: list[list[str]]
    account: Account | None

    def shell_lines(self) -> list[str]:
        """The steps as they can be pasted; the password is read when they run."""
        return [
            f"cd {shlex.quote(str(self.bsp))}",
            *(" ".join(self._quoted(word) for word in step) for step in self.steps),
        ]

    def _quoted(self, word: str) -> str:
        if word == PASSWORD and self.account:
            return f'"$(cat {shlex.quote(str(self.account.password_file.absolute()))})"'
        return shlex.quote(word)


def make_plan(
    name: str, release: str, bsp: Path, *, storage: str | None, super_mode: bool, account: Account | None
) -> Plan:
    """Raises RefusedError where no such board can be flashed with such a release."""
    target = TARGETS[name]
    conf = conf_of(target, super_mode)
    flash = flash_command(target, release, storage or target.storages[0], conf)
    steps = [["sudo", "./tools/l4t_flash_prerequisites.sh"], ["sudo", "./apply_binaries.sh"]]
    if target.name == "agx-thor":
        steps[1].append("--openrm")
    if account:
        account.check()
        user = ["-u", account.user, "-p", PASSWORD, "-n", account.host_name]
        steps.append(["sudo", "./tools/l4t_create_default_user.sh", *user, "--accept-license"])
    return Plan(target, release, conf, bsp, [*steps, flash], account)


def check_boards(plan: Plan, boards: list[UsbBoard]) -> None:
    """Raises RefusedError where what is in recovery mode is another board than the one that was named."""
    for board in boards:
        if board.state == "recovery" and board.product not in plan.target.products:
            raise RefusedError(
                f"the board at USB {board.place} is {board.module} ({board.product}), not {plan.target.name}; "
                "name the right board, or unplug this one"
            )


def obstacles(plan: Plan, boards: list[UsbBoard]) -> list[str]:
    """What keeps the plan from being executed now; empty where nothing does."""
    ready = [board for board in boards if board.state == "recovery"]
    found = []
    if len(ready) != 1:
        found.append(f"{len(ready)} boards in recovery mode on USB; it must be one" + _running(boards))
    if platform.machine() != "x86_64":
        found.append(f"NVIDIA's tools need an x86_64 host, this is {platform.machine()}")
    if jetpack_of(plan.release) == UNKNOWN:
        found.append(f"L4T {plan.release} is no release that is known here")
    needed = [Path(step[1]) for step in plan.steps] + [Path(f"{plan.conf}.conf"), Path("rootfs/etc")]
    missing = [str(path) for path in needed if not (plan.bsp / path).exists()]
    if missing:
        found.append(
            f"{plan.bsp}: not an unpacked Jetson Linux with its root file system; missing {', '.join(missing)}"
        )
    inside = release_of(Machine(plan.bsp / "rootfs").text("/etc/nv_tegra_release"))
    if inside not in (UNKNOWN, plan.release):
        found.append(f"{plan.bsp} holds L4T {inside}, not {plan.release}")
    return found


def _running(boards: list[UsbBoard]) -> str:
    up = [board.place for board in boards if board.state == "running"]
    return f"; the one at {up[0]} runs Linux: power it on again with the recovery button held" if up else ""
