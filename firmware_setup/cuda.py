"""Whether torch computes on this board's GPU, and right; asked in a process of its own, which may hang or die."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firmware_setup.machine import LONGEST_LINE, Answer, Machine

PROBE = Path(__file__).with_name("cuda_probe.py")
CUDA_S = 120.0  # a first import of torch from an SD card, and the first use of the GPU


@dataclass(frozen=True)
class Cuda:
    asked: bool = True
    python: str | None = None  # of the interpreter that was asked
    torch: str | None = None  # None: not installed, or does not load
    built_for_cuda: str | None = None  # 12.6; None: a build without CUDA
    available: bool | None = None
    device: str | None = None
    capability: str | None = None  # 8.7
    products_right: bool | None = None  # None: no product was computed
    numpy_bridge: bool | None = None  # torch and numpy share arrays
    error: str | None = None


NOT_ASKED = Cuda(asked=False)


def ask_cuda(machine: Machine, python: str = sys.executable, *, timeout_s: float = CUDA_S) -> Cuda:
    return cuda_of(machine.run(python, "-c", PROBE.read_text(encoding="utf-8"), timeout_s=timeout_s))


def cuda_of(answer: Answer) -> Cuda:
    """What the probe's last line of JSON says; its other lines are torch's."""
    said = _last_document(answer.text) if answer.code is not None else None
    if said is None:
        last = (answer.text.strip().splitlines() or ["it said nothing"])[-1][:LONGEST_LINE]
        return Cuda(error=last if answer.code is None else f"it ended with code {answer.code}: {last}")
    return Cuda(
        python=_word(said.get("python")),
        torch=_word(said.get("torch")),
        built_for_cuda=_word(said.get("built_for_cuda")),
        available=_truth(said.get("available")),
        device=_word(said.get("device")),
        capability=_word(said.get("capability")),
        products_right=_truth(said.get("products_right")),
        numpy_bridge=_truth(said.get("numpy_bridge")),
        error=_word(said.get("error")),
    )


def _last_document(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                document = json.loads(line)
            except (ValueError, RecursionError):
                return None
            return document if isinstance(document, dict) else None
    return None


def _word(value: object) -> str | None:
    return value[:300] if isinstance(value, str) else None


def _truth(value: object) -> bool | None:
    return value if isinstance(value, bool) else None
