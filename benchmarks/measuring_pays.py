"""What measuring is worth: WLR on estimates that are measured, on Eq. 6 as it was at the start, and on the truth.

Runs configs/blockage.toml (or another run file) three times over emulated links, `estimator.estimates` being online,
static and oracle; every prompt meets the same channel in all of them. Goals: online within 10 % of oracle's latency,
and static at least 1.3 times online's, at equal quality: the others' latency is read off between their thresholds, at
the perplexity of the online one. The last line is one JSON document.

    python benchmarks/measuring_pays.py
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

RUN_FILE = Path(__file__).parents[1] / "configs" / "blockage.toml"
KINDS = ("online", "static", "oracle")


def measured(file: Path, kind: str, out: Path) -> dict[str, PolicyResult]:
    config = load_run_file(file, [f"estimator.estimates={kind}"])
    results = run_experiment(config, config_path=file, out=out, insecure=False, display=Console(stderr=True))
    return {" ".join([row.policy, *(f"{k}={v}" for k, v in row.params.items())]): row for row in results.rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=RUN_FILE, help="the run file")
    file = parser.parse_args().file
    with tempfile.TemporaryDirectory() as folder:
        runs = {kind: measured(file, kind, Path(folder)) for kind in KINDS}
    document, heads = {}, "".join(f"{kind + ' s':>11}{'perplexity':>12}" for kind in KINDS)
    print(f"{'policy':16}{heads}   at online's perplexity: online/oracle  static/online")
    for policy, online in runs["online"].items():
        rows = {kind: runs[kind][policy] for kind in KINDS}
        oracle_s, static_s = (at_perplexity(runs[kind], online.perplexity) for kind in ("oracle", "static"))
        ratios = {
            "online_to_oracle": online.prefill_block_sum_s / oracle_s,
            "static_to_online": static_s / online.prefill_block_sum_s,
        }
        document[policy] = {
            "prefill_sum_s": {kind: row.prefill_block_sum_s for kind, row in rows.items()},
            "perplexity": {kind: row.perplexity for kind, row in rows.items()},
            "overrun_fraction": {kind: row.overrun_fraction for kind, row in rows.items()},
            "at_equal_perplexity": {name: None if np.isnan(ratio) else ratio for name, ratio in ratios.items()},
        }
        cells = "".join(f"{row.prefill_block_sum_s:11.3f}{row.perplexity:12.3f}" for row in rows.values())
        print(f"{policy:16}{cells}{ratios['online_to_oracle']:38.3f}{ratios['static_to_online']:15.3f}")
    print(json.dumps(document))


def at_perplexity(rows: dict[str, PolicyResult], perplexity: float) -> float:
    """Latency of these policies at another's perplexity, between two of them; NaN beyond the last."""
    points = sorted((row.perplexity, row.prefill_block_sum_s) for row in rows.values())
    xs, ys = zip(*points, strict=True)
    return float(np.interp(perplexity, xs, ys, left=np.nan, right=np.nan))


if __name__ == "__main__":
    main()
