"""Rates of boards' uplinks, set over ssh: a token bucket on the interface that leads to the base station.

It lasts until it is lifted or the board reboots. What a run shapes itself ([shaping]) needs none of this.
Not yet run on hardware.
"""

from __future__ import annotations

import re
from typing import Any

from testbed.errors import ConfigError
from testbed.fleet.inventory import Board
from testbed.fleet.remote import Answer

HANDLE = "d0f:"  # of our root qdisc
LOWEST_MBIT_PER_S, HIGHEST_MBIT_PER_S = 0.01, 10_000.0
RATE = re.compile(r"\brate ([0-9.]+)([KMG]?)bit\b")
IN_MBIT = {"": 1e-6, "K": 1e-3, "M": 1.0, "G": 1e3}
FRAME_BYTES, HEADER_BYTES, TIMER_LATE_S = 1514, 66, 200e-6


def shape_script(board: Board, mbit_per_s: float | None) -> str:
    """Limit what the board sends, whoever to, by a token bucket on the interface towards the base station; None: lift.

    A qdisc that another program set is left alone. Prints the root qdisc in the end.
    """
    if board.bs_address is None or not re.fullmatch(r"[0-9.]+", board.bs_address):
        raise ConfigError(f"{board.name}: wdmoe_bs_address is missing in the inventory: shaping needs to know the way")
    if mbit_per_s is None:
        act = f'case $now in *" {HANDLE} "*) sudo -n tc qdisc delete dev "$dev" root ;; esac'
    else:
        burst_bytes = FRAME_BYTES + round(mbit_per_s * 1e6 / 8 * TIMER_LATE_S)
        bucket = f"tbf rate {round(mbit_per_s * 1e6)}bit burst {burst_bytes} latency 200ms"
        stab = f"stab overhead -{HEADER_BYTES} linklayer ethernet"
        act = f'sudo -n tc qdisc replace dev "$dev" root handle {HANDLE} {stab} {bucket}'
    return f"""export PATH="$PATH:/usr/sbin:/sbin"
dev=$(ip -o route get {board.bs_address} | sed -n 's/.* dev \\([^ ]*\\).*/\\1/p')
now=$(tc qdisc show dev "$dev" root | head -n 1)
case $now in
    ""|*" {HANDLE} "*|*" 0: "*) ;;
    *) echo "$dev has a root qdisc of another program ($now)" >&2; exit 1 ;;
esac
{act} || exit 1
echo "$dev: $(tc qdisc show dev "$dev" root | head -n 1)"
"""


def shaped(answer: Answer) -> dict[str, Any]:
    """What a board answered to `shape_script`."""
    rate = RATE.search(answer.out) if f" {HANDLE} " in answer.out else None
    said = answer.error or (None if answer.good else f"exit code {answer.code}")
    return {
        "device": answer.board.name,
        "done": answer.good,
        "interface": answer.out.partition(":")[0] if answer.good else None,
        "mbit_per_s": float(rate[1]) * IN_MBIT[rate[2]] if rate else None,
        "error": None if answer.good else said,
    }
