"""Cost of recording one expert round: 8 devices, 8 experts, top-2, with 4 and with 512 tokens.

    python benchmarks/recording.py

Prints median, 99th percentile and the cost with rolling over to new segments; the last line is one JSON document.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import KEY_NAMES, ROUND_COLUMNS

DEVICES, TOP_K, EXPERTS, ROUNDS = 8, 2, 8, 4000
OF_THE_ROUND = ("select_ns", "group_ns", "quantise_ns", "wait_ns", "dequantise_ns", "combine_ns", "round_ns")
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


def record_us(tokens: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Microseconds of each of ROUNDS calls, the first touch of every page included."""
    rng = np.random.default_rng(7)
    rounds, of_tokens = round_columns(rng), token_columns(rng, tokens)
    cost_us = np.empty(ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"device-{index}" for index in range(DEVICES)]
        recorder = Recorder(Path(folder), "benchmark", names, top_k=TOP_K, experts=EXPERTS)
        for number in range(ROUNDS):
            start_ns = time.perf_counter_ns()
            recorder.record_round({**rounds, "round": number}, of_tokens)
            cost_us[number] = (time.perf_counter_ns() - start_ns) / 1000
        recorder.close()
    return cost_us


def main() -> None:
    result = {}
    for tokens, limit_us in LIMIT_US.items():
        cost_us = record_us(tokens)
        median_us = float(np.median(cost_us))
        p99_us = float(np.percentile(cost_us, 99))
        print(
            f"{tokens:4d} tokens: median {median_us:6.1f} us (limit {limit_us:.0f}), p99 {p99_us:6.1f} us, "
            f"worst {cost_us.max() / 1000:.1f} ms, mean with new segments {cost_us.mean():.1f} us"
        )
        result[f"record_{tokens}_tokens_us"] = round(median_us, 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
