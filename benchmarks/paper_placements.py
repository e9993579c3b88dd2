"""The paper's setting over ten seeded placements: what WLR cuts of the measured prefill, and of Eq. 8, with intervals.

Runs configs/paper.toml once per placement with top-k and WLR, over emulated links. Cuts are paired per placement: 1 -
sum of block times / the same sum under top-k on the same prompts and channel. The interval is a bootstrap over
placements.
Goal: WLR 0.2 cuts at least 18 % of the measured prefill block latency. The last line is one JSON document.

    python benchmarks/paper_placements.py --placements 10
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from testbed.config import load_run_file
from testbed.experiment.results import PolicyResult
from testbed.experiment.run import run_experiment

RUN_FILE = Path(__file__).parents[1] / "configs" / "paper.toml"
RESAMPLES = 10_000


def placed(seed: int, out: Path, overrides: list[str]) -> list[PolicyResult]:
    config = load_run_file(RUN_FILE, [f"radio.placement.seed={seed}", f"seed={seed}", *overrides])
    return run_experiment(config, config_path=RUN_FILE, out=out, insecure=False, display=Console(stderr=True)).rows


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % bootstrap interval over placements."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return float(np.mean(values)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--placements", type=int, default=10, help="how many (default 10)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the run file")
    args = parser.parse_args()
    found: dict[str, list[PolicyResult]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.placements):
            rows = placed(seed, Path(folder), args.set)
            for row in rows:
                label = " ".join([row.policy, *(f"{k}={v}" for k, v in row.params.items())])
                found.setdefault(label, []).append(row)
                print(f"placement {seed}  {label:16} cut {row.prefill_cut:6.1%}  Eq. 8 {row.eq8_cut:6.1%}", flush=True)
    document = {}
    print(
        f"\n{'policy':16} {'cut':>8} {'95 % interval':>20} {'Eq. 8 cut':>10} {'95 % interval':>20} {'perplexity':>11}"
    )
    for label, rows in found.items():
        cut, eq8 = (interval([getattr(row, name) for row in rows]) for name in ("prefill_cut", "eq8_cut"))
        perplexity = float(np.exp(np.mean([np.log(row.perplexity) for row in rows])))
        overruns = max(row.overrun_fraction for row in rows)
        document[label] = {"prefill_cut": cut, "eq8_cut": eq8, "perplexity": perplexity, "overrun_fraction": overruns}
        cells = [f"{value[0]:8.1%} {f'{value[1]:.1%} to {value[2]:.1%}':>20}" for value in (cut, eq8)]
        print(f"{label:16} {cells[0]} {cells[1]:>31} {perplexity:11.3f}")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
