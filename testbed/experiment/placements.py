"""The same run over several seeded placements: one placement tells little, because distances decide so much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.experiment.results import PolicyResult, Results
from testbed.experiment.statistics import CutInterval, paired_cut_interval


@dataclass(frozen=True, slots=True)
class PlacedPolicy:
    """One policy over all placements: cuts of sums against topk, paired per placement, with 95 % intervals."""

    policy: str
    params: dict[str, Any]
    bandwidth: str
    period: str
    prefill: CutInterval
    eq8: CutInterval
    decode: CutInterval
    perplexity: float  # geometric mean
    accuracy: float
    kept_fraction: float
    dropped_mass: float
    overrun_fraction: float  # of the worst placement
    valid: bool

    def row(self) -> dict[str, Any]:
        """Under the names of a run's own rows."""
        intervals = {
            f"{name}_cut{end}": value
            for name in ("prefill", "eq8", "decode")
            for end, value in zip(("", "_low", "_high"), getattr(self, name), strict=True)
        }
        others = {key: value for key, value in asdict(self).items() if key not in ("prefill", "eq8", "decode")}
        return {**others, **intervals}


@dataclass(frozen=True, slots=True)
class PlacementResults:
    """The table over all placements, and the runs it comes from."""

    runs: list[Results]
    rows: list[PlacedPolicy]

    @property
    def valid(self) -> bool:
        return all(run.valid for run in self.runs)

    def document(self) -> dict[str, Any]:
        return {
            "placements": len(self.runs),
            "runs": [str(run.run_dir) for run in self.runs],
            "emulated": self.runs[0].emulated,
            "links": self.runs[0].links,
            "valid": self.valid,
            "rows": [row.row() for row in self.rows],
        }


def placement_overrides(config: RunConfig, placements: int) -> list[list[str]]:
    """What is set for each run. Raises ConfigError where distances are not drawn."""
    if config.radio is None or config.radio.placement is None:
        raise ConfigError("--placements: distances are not drawn here; give the run file [radio.placement]")
    return [[f"radio.placement.seed={seed}", f"seed={seed}"] for seed in range(placements)]


def over_placements(config: RunConfig, placements: int, run: Callable[[list[str]], Results]) -> PlacementResults:
    """`run` makes one run with some overrides."""
    runs = [run(overrides) for overrides in placement_overrides(config, placements)]
    return PlacementResults(runs, summed_up([results.rows for results in runs]))


def summed_up(rows_of_runs: Sequence[Sequence[PolicyResult]]) -> list[PlacedPolicy]:
    reference = [rows[0] for rows in rows_of_runs]
    return [_placed(mine, reference) for mine in zip(*rows_of_runs, strict=True)]


def _placed(mine: Sequence[PolicyResult], reference: Sequence[PolicyResult]) -> PlacedPolicy:
    def cut(name: str) -> CutInterval:
        sums, references = (np.array([getattr(row, name) for row in rows]) for rows in (mine, reference))
        known = references > 0
        return paired_cut_interval(sums[known], references[known])

    def mean(name: str) -> float:
        return float(np.mean([getattr(row, name) for row in mine]))

    return PlacedPolicy(
        policy=mine[0].policy,
        params=mine[0].params,
        bandwidth=mine[0].bandwidth,
        period=mine[0].period,
        prefill=cut("prefill_block_sum_s"),
        eq8=cut("eq8_sum_s"),
        decode=cut("decode_sum_s"),
        perplexity=float(np.exp(np.mean([np.log(row.perplexity) for row in mine]))),
        accuracy=mean("accuracy"),
        kept_fraction=mean("kept_fraction"),
        dropped_mass=mean("dropped_mass"),
        overrun_fraction=max(row.overrun_fraction for row in mine),
        valid=all(row.valid for row in mine),
    )
