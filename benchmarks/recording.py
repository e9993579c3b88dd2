"""Cost of recording one expert round: 8 devices, 8 experts, top-2, with 4 and with 512 tokens.

    python benchmarks/recording.py

Prints the median of one call; then what two million rows without a pause come to, with new segments and with everything
brought to the disk of the temporary folder (TMPDIR) twice a second. The last line is one JSON document.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from testbed.runlog.columns import KEY_NAMES, ROUND_COLUMNS
from testbed.runlog.recorder import Recorder

DEVICES, TOP_K, EXPERTS, ROUNDS = 8, 2, 8, 4000
OF_THE_ROUND = ("select_ns", "group_ns", "quantise_ns", "wait_ns", "dequantise_ns", "combine_ns", "round_ns")
SUSTAINED_ROWS, LONG_US = 2_000_000, 10_000
LIMIT_US = {4: 30.0, 512: 150.0}


def round_columns(rng: np.random.Generator) -> dict[str, Any]:
    """Every column a base station gives: scalars for what belongs to the round, arrays of 8 for the rest."""
    own = {"device", "tokens", "record_ns_previous", "attempt", *KEY_NAMES, *OF_THE_ROUND}
    scalars = {name: int(rng.integers(1, 1_000_000)) for name in OF_THE_ROUND}
    keys = {"policy": 1, "prompt": 3, "layer": 2, "phase": 1, "attempt": 0}
    per_device = {c.name: rng.integers(0, 2, DEVICES).astype(c.format) for c in ROUND_COLUMNS if c.name not in own}
    return {**keys, **scalars, **per_device}


def token_columns(rng: np.random.Generator, tokens: int) -> dict[str, Any]:
    shape_TK = (tokens, TOP_K)
    return {
        "expert": rng.integers(0, EXPERTS, shape_TK),
        "asked": rng.integers(0, EXPERTS, shape_TK),
        "weight": rng.random(shape_TK, np.float32),
        "kept": rng.random(shape_TK) > 0.2,
        "device": rng.integers(-1, DEVICES, shape_TK),
        "final_weight": rng.random(shape_TK, np.float32),
        "score": rng.random((tokens, EXPERTS), np.float32),
        "orphaned": np.zeros(tokens, bool),
    }


def record_us(folder: Path, tokens: int, rounds: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Microseconds of each call, the first touch of every page included; no pause in between."""
    rng = np.random.default_rng(7)
    of_devices, of_tokens = round_columns(rng), token_columns(rng, tokens)
    cost_us = np.empty(rounds)
    names = [f"device-{index}" for index in range(DEVICES)]
    with Recorder(folder, "benchmark", names, top_k=TOP_K, experts=EXPERTS) as recorder:
        for number in range(rounds):
            start_ns = time.perf_counter_ns()
            recorder.record_round({**of_devices, "round": number}, of_tokens)
            cost_us[number] = (time.perf_counter_ns() - start_ns) / 1000
    return cost_us


def watching_the_clock_us(step_us: float, steps: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Steps as long as a call, in which nothing is done: what other work on this machine holds up by itself."""
    cost_us = np.empty(steps)
    for step in range(steps):
        start_ns = time.perf_counter_ns()
        while (now_ns := time.perf_counter_ns()) - start_ns < step_us * 1000:
            pass
        cost_us[step] = (now_ns - start_ns) / 1000
    return cost_us


def sustained(tokens: int) -> dict[str, float]:
    """Two million rows, with new segments and brought to the disk: rows per second, and the share of slow rounds."""
    with tempfile.TemporaryDirectory() as folder:
        cost_us = record_us(Path(folder), tokens, SUSTAINED_ROWS // (DEVICES + tokens))
    idle_us = watching_the_clock_us(float(np.median(cost_us)), len(cost_us))
    return {
        "rows_per_s": round(len(cost_us) * (DEVICES + tokens) / cost_us.sum() * 1e6),
        "p50_us": round(float(np.median(cost_us)), 1),
        "p99_us": round(float(np.percentile(cost_us, 99)), 1),
        "max_ms": round(float(cost_us.max()) / 1000, 2),
        "over_10_ms": float((cost_us > LONG_US).mean()),
        "over_10_ms_without_recording": float((idle_us > LONG_US).mean()),
    }


def main() -> None:
    result: dict[str, Any] = {}
    for tokens, limit_us in LIMIT_US.items():
        with tempfile.TemporaryDirectory() as folder:
            median_us = float(np.median(record_us(Path(folder), tokens, ROUNDS)))
        print(f"{tokens:4d} tokens: median {median_us:.1f} us (limit {limit_us:.0f})")
        result[f"record_{tokens}_tokens_us"] = round(median_us, 1)
    for tokens in LIMIT_US:
        found = sustained(tokens)
        result[f"sustained_{tokens}_tokens"] = found
        print(
            f"{tokens:4d} tokens, {SUSTAINED_ROWS:,} rows: {found['rows_per_s']:,.0f} rows/s (goal 100,000), "
            f"p50 {found['p50_us']} us, p99 {found['p99_us']} us, worst {found['max_ms']} ms, "
            f"{found['over_10_ms']:.4%} of the rounds over 10 ms (goal: at most 1 %; "
            f"{found['over_10_ms_without_recording']:.4%} on this machine without recording)"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
