"""What a weight format costs on this machine: bytes, error and time of one expert, beside float16.

Measured, with the kernels that a node with torch on a CPU uses and as many threads as torch has here. Another machine's
figures differ, a board's most of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.ffn_torch import Weights, ffn_torch
from testbed.checkpoint.packed_weights import compute_dtype, hold_expert
from testbed.checkpoint.stored_formats import FLOAT_NAMES, expert_bytes
from testbed.checkpoint.weight_formats import Tensors, encode_expert

BASELINE = "float16"
ROWS = (1, 16, 128)
COLD_BYTES = 64 << 20  # a node goes from expert to expert: copies of one, so that none stays in the cache
LEAST_TURNS = 3
PATIENCE_S = 2.0  # a turn so long varies little: there need not be three
SLOWER = 1.1  # times the baseline: less is within what a shared machine varies
ERROR_ROWS = 16


class FormatSpeed(NamedTuple):
    """Milliseconds of one expert in the format and in the baseline, for each number of rows."""

    rows: tuple[int, ...]
    milliseconds: tuple[float, ...]
    baseline_milliseconds: tuple[float, ...]

    def slower_at(self) -> list[int]:
        """Numbers of rows at which the format is slower than the baseline."""
        pairs = zip(self.rows, self.milliseconds, self.baseline_milliseconds, strict=True)
        return [rows for rows, ours, theirs in pairs if ours > SLOWER * theirs]


class FormatCost(NamedTuple):
    """What `testbed split` shows of a format."""

    weight_format: str
    expert_bytes: int
    baseline_bytes: int
    relative_error: float
    threads: int
    speed: FormatSpeed

    def line(self) -> str:
        """For people: one line, which says so where the format is slower here."""
        mb, baseline_mb = self.expert_bytes / 1e6, self.baseline_bytes / 1e6
        times = ", ".join(
            f"{rows} rows {ours:.3g} ms ({theirs:.3g})"
            for rows, ours, theirs in zip(
                self.speed.rows, self.speed.milliseconds, self.speed.baseline_milliseconds, strict=True
            )
        )
        slower = self.slower_at()
        verdict = f"; slower than {BASELINE} on this device at {', '.join(map(str, slower))} rows" if slower else ""
        return (
            f"{self.weight_format}: {mb:.4g} MB an expert ({BASELINE} {baseline_mb:.4g}), relative error "
            f"{self.relative_error:.2g}; measured here, threads {self.threads}: {times}{verdict}"
        )

    def as_dict(self) -> dict[str, object]:
        """For machines."""
        return {
            **self._asdict(), "baseline": BASELINE, "speed": self.speed._asdict(), "slower_at": self.slower_at()
        }  # fmt: skip

    def slower_at(self) -> list[int]:
        """Numbers of rows at which it is slower than the baseline on this machine."""
        return [] if self.weight_format == BASELINE else self.speed.slower_at()


@torch.inference_mode()
def format_error(spec: FfnSpec, tensors: Tensors, fmt: str, x_RD: torch.Tensor) -> float:
    """Root mean square of what an expert's output is wrong by, over that of its output in float32 from `tensors`."""
    exact_RD = ffn_torch(x_RD.float(), {part: tensor.float() for part, tensor in tensors.items()}, spec)
    given_RD = _computed(x_RD, encode_expert(tensors, fmt, spec), spec, fmt)
    return float((given_RD.float() - exact_RD).norm() / exact_RD.norm().clamp(min=torch.finfo(torch.float32).tiny))


@torch.inference_mode()
def format_speed(
    spec: FfnSpec, tensors: Tensors, fmt: str, rows: Sequence[int] = ROWS, *, seconds: float = 0.3
) -> FormatSpeed:
    """Times one expert in the format and in the baseline, in turn, for each number of rows: for `seconds`, or three
    turns, or as many as begin in two seconds.
    """
    formats = (fmt, BASELINE)
    runs = [_Run(spec, tensors, name) for name in formats]
    _fastest_ms([run.on(1) for run in runs], 0)  # the first products choose and load their kernels
    fastest = [_fastest_ms([run.on(count) for run in runs], seconds) for count in rows]
    ours, theirs = zip(*fastest, strict=True)
    return FormatSpeed(tuple(rows), ours, theirs)


def format_cost(spec: FfnSpec, tensors: Tensors, fmt: str, rows: Sequence[int] = ROWS) -> FormatCost:
    """Bytes, error on rows of a normal distribution, and speed of one expert. Raises CheckpointError, as encoding does.

    The rows are synthetic: scaled as behind a normalisation, without a model's outliers.
    """
    x_RD = torch.randn(ERROR_ROWS, spec.width, generator=torch.Generator().manual_seed(0))
    error = format_error(spec, tensors, fmt, x_RD)
    speed = format_speed(spec, tensors, fmt, rows)
    held, baseline = expert_bytes(spec, fmt), expert_bytes(spec, BASELINE)
    return FormatCost(fmt, held, baseline, error, torch.get_num_threads(), speed)


def _computed(x_RD: torch.Tensor, stored: Tensors, spec: FfnSpec, fmt: str) -> torch.Tensor:
    dtype = compute_dtype(fmt, fmt if fmt in FLOAT_NAMES else BASELINE)
    return ffn_torch(x_RD.to(dtype), hold_expert(stored, spec, fmt, dtype), spec)


class _Run:
    """An expert in one format, several times over where one would stay in the cache."""

    def __init__(self, spec: FfnSpec, tensors: Tensors, fmt: str) -> None:
        self._spec, self._dtype = spec, compute_dtype(fmt, fmt if fmt in FLOAT_NAMES else BASELINE)
        stored = encode_expert(tensors, fmt, spec)
        copies = -(-COLD_BYTES // expert_bytes(spec, fmt))
        self._held: list[Weights] = [hold_expert(stored, spec, fmt, self._dtype) for _ in range(min(copies, 256))]
        self._turn = 0

    def on(self, rows: int) -> Callable[[], object]:
        x_RD = torch.randn(rows, self._spec.width, generator=torch.Generator().manual_seed(rows)).to(self._dtype)
        return lambda: self._next(x_RD)

    def _next(self, x_RD: torch.Tensor) -> torch.Tensor:
        self._turn = (self._turn + 1) % len(self._held)
        return ffn_torch(x_RD, self._held[self._turn], self._spec)


def _fastest_ms(steps: Sequence[Callable[[], object]], seconds: float) -> tuple[float, ...]:
    """Milliseconds of each step's fastest turn: what else the machine does can only add. The steps alternate."""
    times_ns: list[list[int]] = [[] for _ in steps]
    started_s, spent_s, turns = time.perf_counter(), 0.0, 0
    while turns == 0 or spent_s < seconds or (turns < LEAST_TURNS and spent_s < PATIENCE_S):
        for step, taken_ns in zip(steps, times_ns, strict=True):
            began_ns = time.perf_counter_ns()
            step()
            taken_ns.append(time.perf_counter_ns() - began_ns)
        turns, spent_s = turns + 1, time.perf_counter() - started_s
    return tuple(min(taken_ns) / 1e6 for taken_ns in times_ns)
