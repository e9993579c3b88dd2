"""What was recorded of one policy, and what it cut against another one over the same prompts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from testbed.experiment.emulated_time import EMULATED_ROUND, eq8_sum_s
from testbed.experiment.statistics import CutInterval, paired_cut_interval
from testbed.experiment.whole_prompts import in_common, of_prompts
from testbed.runlog.schema import GenerationPhase

Floats = NDArray[np.float64]


class Taken(NamedTuple):
    """What was recorded of one policy."""

    rounds: pa.Table
    tokens: pa.Table
    events: list[dict[str, Any]]

    @staticmethod
    def of(index: int, rounds: pa.Table, tokens: pa.Table, events: list[dict[str, Any]]) -> Taken:
        mine = [event for event in events if event.get("policy") == index]
        return Taken(_only(rounds, index), _only(tokens, index), mine)

    def of_prompts(self, prompts: pa.Array) -> Taken:
        return Taken(of_prompts(self.rounds, prompts), of_prompts(self.tokens, prompts), self.events)

    @property
    def decode_s(self) -> float:
        """Of all expert rounds of generated tokens."""
        return float(round_s(self.rounds, GenerationPhase.DECODE).sum())


class Cuts(NamedTuple):
    prefill: CutInterval
    eq8: float
    decode: float


def cuts(mine: Taken, reference: Taken) -> Cuts:
    """Over the prompts that both have."""
    common = in_common(mine.rounds, reference.rounds)
    mine, reference = mine.of_prompts(common), reference.of_prompts(common)
    return Cuts(
        paired_cut_interval(prompt_sums_s(mine.rounds), prompt_sums_s(reference.rounds)),
        _cut(eq8_sum_s(mine.tokens, mine.events), eq8_sum_s(reference.tokens, reference.events)),
        _cut(mine.decode_s, reference.decode_s),
    )


def round_s(rounds: pa.Table, phase: GenerationPhase, column: str = EMULATED_ROUND) -> Floats:
    """Seconds of each expert round of a phase, once per round, in their order."""
    chosen = rounds.filter(pc.and_(pc.equal(rounds["phase"], int(phase)), pc.equal(rounds["device"], 0)))
    seconds: Floats = chosen[column].to_numpy() / 1e9
    return seconds


def prompt_sums_s(rounds: pa.Table) -> Floats:
    """Seconds of all prefill rounds of each prompt, in the prompts' order."""
    chosen = rounds.filter(
        pc.and_(pc.equal(rounds["phase"], int(GenerationPhase.PREFILL)), pc.equal(rounds["device"], 0))
    )
    _, prompt_R = np.unique(chosen["prompt"].to_numpy(), return_inverse=True)
    return np.bincount(prompt_R, chosen[EMULATED_ROUND].to_numpy() / 1e9).astype(float)


def _only(table: pa.Table, policy: int) -> pa.Table:
    return table.filter(pc.equal(table["policy"], policy))


def _cut(sum_s: float, reference_s: float) -> float:
    return 1 - sum_s / reference_s if reference_s > 0 else math.nan
