"""What a simulation showed: one row per policy, under the names that a run's results have where they mean the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from testbed.experiment.statistics import CutInterval, paired_cut_interval
from testbed.policies.base import FloatArray
from testbed.simulation.kernels import EQ8_S, KEPT, MASS, ORPHANED, SENT
from testbed.simulation.montecarlo import Simulated
from testbed.simulation.routing import PackedBlocks

MOST_PAIRS = 200  # neighbouring draws are added up to so many, which also holds where the channel has a memory


@dataclass(frozen=True, slots=True)
class SimulatedPolicy:
    """One policy's figures. Seconds, fractions, megabytes (1e6 bytes); NaN where unknown. Times are simulated.

    Sums are over the routing's blocks, in the mean over the draws; percentiles are over all draws and blocks.
    """

    policy: str
    params: dict[str, Any]
    bandwidth: str
    period: str
    prefill_block_p50_s: float
    prefill_block_p95_s: float
    prefill_block_sum_s: float
    prefill_cut: float  # 1 - sum of block times / the same sum under the first policy, in the same draws
    prefill_cut_low: float  # ... and its 95 % interval
    prefill_cut_high: float
    prefill_cut_p50: float  # median over the draws of each draw's own cut: rare deep fades do not decide it
    eq8_sum_s: float  # Eq. 8 at the even split: every token waits for its own slowest device
    eq8_cut: float
    eq8_cut_low: float
    eq8_cut_high: float
    eq8_cut_p50: float
    perplexity: float  # measured in this process, on the prompts' own channels; NaN where that was not asked for
    accuracy: float
    kept_fraction: float  # of the pairs (token, expert) that the gate chose
    dropped_mass: float  # share of the gate's weight that was not computed
    megabytes_down: float  # of rows, without headers
    megabytes_up: float
    bytes_row_down: int
    bytes_row_up: int
    orphaned_fraction: float  # tokens of a block without any expert's output


@dataclass(frozen=True, slots=True)
class SimulationResults:
    """A simulation's table, and what one must know to understand it."""

    name: str
    about: Mapping[str, Any]
    rows: list[SimulatedPolicy]

    def document(self) -> dict[str, Any]:
        """For machines: the last line of `testbed simulate --json`."""
        return {"kind": "simulated", "name": self.name, **self.about, "rows": [asdict(row) for row in self.rows]}


def paired_cut(values_D: FloatArray, reference_D: FloatArray, placements: int) -> CutInterval:
    """The cut over the draws of `placements` placements, one after another; several are the pairs themselves."""
    values_PD, reference_PD = values_D.reshape(placements, -1), reference_D.reshape(placements, -1)
    if placements > 1:
        return paired_cut_interval(values_PD.sum(axis=1), reference_PD.sum(axis=1))
    parts = min(MOST_PAIRS, values_PD.shape[1])
    sums, references = ([part.sum() for part in np.array_split(v[0], parts)] for v in (values_PD, reference_PD))
    return paired_cut_interval(np.array(sums), np.array(references))


def policy_row(
    about: Mapping[str, Any],
    simulated: Sequence[Simulated],
    reference: Sequence[Simulated],
    packed: PackedBlocks,
    row_bytes: tuple[int, int],
    quality: tuple[float, float] | None,
) -> SimulatedPolicy:
    """One policy's figures; it and the first policy (`reference`) came to one `Simulated` per placement."""
    mine, theirs = Simulated.joined(simulated), Simulated.joined(reference)
    sum_s_D, reference_s_D = mine.block_s_DB.sum(axis=1), theirs.block_s_DB.sum(axis=1)
    eq8_s_D, reference_eq8_s_D = mine.sums_DS[:, EQ8_S], theirs.sums_DS[:, EQ8_S]
    cut = paired_cut(sum_s_D, reference_s_D, len(simulated))
    eq8_cut = paired_cut(eq8_s_D, reference_eq8_s_D, len(simulated))
    mean_S = mine.sums_DS.mean(axis=0)
    p50_s, p95_s = np.percentile(mine.block_s_DB, [50, 95])
    perplexity, accuracy = quality or (math.nan, math.nan)
    return SimulatedPolicy(
        **about,
        prefill_block_p50_s=float(p50_s),
        prefill_block_p95_s=float(p95_s),
        prefill_block_sum_s=float(sum_s_D.mean()),
        prefill_cut=cut.cut,
        prefill_cut_low=cut.low,
        prefill_cut_high=cut.high,
        prefill_cut_p50=float(np.median(1 - sum_s_D / reference_s_D)),
        eq8_sum_s=float(mean_S[EQ8_S]),
        eq8_cut=eq8_cut.cut,
        eq8_cut_low=eq8_cut.low,
        eq8_cut_high=eq8_cut.high,
        eq8_cut_p50=float(np.median(1 - eq8_s_D / reference_eq8_s_D)),
        perplexity=perplexity,
        accuracy=accuracy,
        kept_fraction=float(mean_S[KEPT] / packed.pairs),
        dropped_mass=float(mean_S[MASS] / packed.mass),
        megabytes_down=float(mean_S[SENT] * row_bytes[0] / 1e6),
        megabytes_up=float(mean_S[KEPT] * row_bytes[1] / 1e6),
        bytes_row_down=row_bytes[0],
        bytes_row_up=row_bytes[1],
        orphaned_fraction=float(mean_S[ORPHANED] / packed.tokens),
    )
