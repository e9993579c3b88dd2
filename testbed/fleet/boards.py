"""What boards say of themselves over ssh: the node's unit, and the preflight where it is installed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from testbed.fleet.inventory import Board
from testbed.fleet.remote import Answer, ask_all

MARK = "---preflight---"


def status_script(board: Board) -> str:
    """Asks systemd for the unit and the board for its preflight, without its GPU: a run may be under way."""
    return f"""export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
systemctl show {board.unit} --property=LoadState,ActiveState,SubState,NRestarts,MainPID,ActiveEnterTimestamp
echo BootId=$(cat /proc/sys/kernel/random/boot_id)
echo UptimeS=$(ps -o etimes= -p 1)
echo {MARK}
cd / && sudo -n {board.python} -m firmware_setup.preflight --json --no-cuda{_bs(board)} 2>&1
true
"""


def _bs(board: Board) -> str:
    plain = board.bs_address is not None and re.fullmatch(r"[0-9.]+", board.bs_address)
    return f" --bs {board.bs_address}" if plain else ""


def board_status(answer: Answer) -> dict[str, Any]:
    """One board's line of `testbed fleet status`; what is not known is None, and `error` says why."""
    head, _, tail = answer.out.partition(MARK)
    words = (line.partition("=") for line in head.splitlines())
    unit = {key: value.strip() for key, _, value in words}
    preflight = _preflight(tail)
    why = None if answer.reached else answer.error or f"ssh ended with exit code {answer.code}"
    if answer.reached and preflight is None:
        why = f"no preflight: {' '.join(tail.split())[-200:] or answer.error or 'it said nothing'}"
    return {
        "device": answer.board.name,
        "address": answer.board.address,
        "virtual": answer.board.virtual,
        "reached": answer.reached,
        "unit": answer.board.unit,
        "state": _state(unit),
        "restarts": _whole(unit.get("NRestarts")),
        "uptime_s": _number(unit.get("UptimeS")),
        "boot_id": unit.get("BootId"),
        "preflight": preflight,
        "error": why,
    }


def _state(unit: dict[str, str]) -> str | None:
    if unit.get("LoadState") == "not-found":
        return "not installed"
    return unit.get("ActiveState")


def _preflight(text: str) -> dict[str, Any] | None:
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,18}", text) else None


def _number(text: str | None) -> float | None:
    return float(text) if text is not None and re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,9})?", text) else None


def look(boards: Sequence[Board], heard: Callable[[Answer], None] = lambda _: None) -> list[dict[str, Any]]:
    """The status of every board, in their order."""
    return [board_status(answer) for answer in tell(boards, status_script, heard)]


def restart_script(board: Board) -> str:
    return f"sudo -n systemctl restart {board.unit} && systemctl is-active {board.unit}\n"


def logs_script(board: Board, lines: int) -> str:
    return f"LC_ALL=C sudo -n journalctl --unit {board.unit} --lines {lines} --no-pager --output short-iso\n"


def tell(
    boards: Sequence[Board], script_of: Callable[[Board], str], heard: Callable[[Answer], None] = lambda _: None
) -> list[Answer]:
    """Have its own script run on every board, and wait for all; those whose scripts are the same work at once."""
    groups: dict[str, list[Board]] = {}
    for board in boards:
        groups.setdefault(script_of(board), []).append(board)
    answers = [answer for script, some in groups.items() for answer in ask_all(some, script, heard=heard)]
    by_name = {answer.board.name: answer for answer in answers}
    return [by_name[board.name] for board in boards]


class OnBoards(NamedTuple):
    """What a run's log is told of the boards it runs on."""

    links: str | None  # in words, as the inventory has them
    told: Mapping[str, Mapping[str, Any]]  # by each board, before the run


def examined(boards: Sequence[Board]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each board's name and what it says of itself, for a run's log; None where it does not say.

    Virtual boards are named so, since their clocks and temperatures are synthetic.
    """
    for found in look(boards):
        preflight = found["preflight"] or {}
        yield (
            found["device"],
            {
                "virtual": found["virtual"],
                "boot_id": found["boot_id"],
                "uptime_s": found["uptime_s"],
                "power_mode": _of(preflight, "power", "mode"),
                "clocks_locked": _of(preflight, "clocks", "locked"),
                "hottest_c": _of(preflight, "thermal", "hottest_c"),
                "zones_c": _of(preflight, "thermal", "zones_c"),
                "wifi": preflight.get("wifi"),
                "warnings": preflight.get("warnings"),
                "problems": preflight.get("problems"),
                "preflight": found["preflight"],
                "error": found["error"],
            },
        )


def _of(preflight: dict[str, Any], part: str, key: str) -> Any:
    found = preflight.get(part)
    return found.get(key) if isinstance(found, dict) else None
