"""Releases with a fault that spoils a run, each with its source."""

from __future__ import annotations

from typing import NamedTuple

from firmware_setup.l4t import Board, Software

ORIN, ORIN_NANO_OR_NX = "p3701 p3767", "p3767"


class KnownBad(NamedTuple):
    l4t: str  # 36.4.7, or 38. for all that begin so
    parts: str  # of the modules it concerns; empty: of all
    text: str
    source: str

    def concerns(self, board: Board, software: Software) -> bool:
        exact = software.l4t == self.l4t
        begins = self.l4t.endswith(".") and software.l4t.startswith(self.l4t)
        return (exact or begins) and (not self.parts or board.part.split("-")[0] in self.parts.split())


KNOWN_BAD = (
    KnownBad(
        "36.4.7",
        ORIN,
        "large allocations on the GPU fail (NvMapMemAllocInternalTagged ... error 12) where 36.4.4 had none; "
        "update to 36.5 or newer",
        "NVIDIA bug 5602402",
    ),
    KnownBad("38.", ORIN, "this release is for Thor only; flash 36.x or 39.2", "Jetson Linux r38.4 documentation"),
    KnownBad(
        "39.2.0",
        ORIN_NANO_OR_NX,
        "its ISO installs Orin Nano without super mode; install 39.2.1 or newer",
        "NVIDIA bug 6279443",
    ),
    KnownBad(
        "39.2.1",
        "",
        "Wi-Fi: access points are missed where there are many (wpa_cli set bss_max_count 500), and 6 GHz with several "
        "networks per radio (MBSSID) is not supported",
        "JetPack 7.2.1 release notes, NVIDIA bugs 5426982 and 5226667",
    ),
)


def known_faults(board: Board, software: Software) -> list[str]:
    return [
        f"L4T {software.l4t}: {fault.text} ({fault.source})" for fault in KNOWN_BAD if fault.concerns(board, software)
    ]
