"""What an evaluation showed, read back from its run's log: a row per task and policy, and one per policy over all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from testbed.errors import RunLogError
from testbed.evaluation.accuracy import mean_interval, paired_difference
from testbed.experiment.emulated_time import EMULATED_ROUND, with_emulated_times
from testbed.experiment.policy_rows import prompt_sums_s
from testbed.experiment.results import Results, kept_and_dropped, summarise
from testbed.experiment.statistics import paired_cut_interval
from testbed.runlog.reader import read_events, read_manifest, read_table
from testbed.runlog.schema import GenerationPhase

EVALUATED = "evaluated"  # the event of a policy's task
ALL = "all items"

Event = dict[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TaskResult:
    """A task under a policy. Fractions and seconds; None where there is nothing to tell it from."""

    policy: str
    task: str
    metric: str
    items: int
    accuracy: float  # mean of the metric over the items
    accuracy_low: float | None  # ... and its 95 % interval
    accuracy_high: float | None
    difference: float  # to the first policy, over the same items
    difference_low: float | None  # ... and its 95 % interval, by a bootstrap over the items, paired
    difference_high: float | None
    gained: int  # items that score higher than under the first policy
    lost: int
    prompts: int  # calls of the model: one per choice with a context of its own, or one per generated answer
    prefill_block_p50_s: float | None
    prefill_block_p95_s: float | None
    prefill_block_sum_s: float
    prefill_cut: float | None  # 1 - that sum / the same under the first policy, over the same prompts
    prefill_cut_low: float | None
    prefill_cut_high: float | None
    decode_token_rounds_p50_s: float | None  # the expert rounds of one generated token, all layers
    decode_sum_s: float
    kept_fraction: float | None  # of the pairs (token, expert) that the gate chose
    dropped_mass: float | None  # share of the gate's weight whose own expert was not computed


@dataclass(frozen=True, slots=True)
class EvaluationResults:
    """`overall` holds what is a policy's and not a task's: losses, bytes, whether the run is valid."""

    overall: Results
    rows: list[TaskResult]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(row.task for row in self.rows))

    @property
    def policies(self) -> list[str]:
        return list(dict.fromkeys(row.policy for row in self.rows))

    def document(self) -> dict[str, Any]:
        """For machines. `rows` are tasks under policies, `policies` the policies over the whole run."""
        document = self.overall.document()
        policies = [{"label": label, **row} for label, row in zip(self.policies, document.pop("rows"), strict=True)]
        return {**document, "rows": [asdict(row) for row in self.rows], "policies": policies}


def summarise_evaluation(run_dir: Path) -> EvaluationResults:
    """The table, from the run's own log. Raises RunLogError where that is damaged or of no evaluation."""
    manifest, events = read_manifest(run_dir), read_events(run_dir)
    evaluated = [event for event in events if event["kind"] == EVALUATED]
    if not evaluated:
        raise RunLogError(f"{run_dir}: holds no evaluation; name a run of `testbed eval`")
    rounds = with_emulated_times(run_dir, read_table(run_dir, "rounds"), manifest, events)
    rounds = rounds.filter(pc.equal(rounds["device"], 0))  # a round's time stands in the row of every device
    tokens = read_table(run_dir, "tokens")
    per_policy = [[event for event in evaluated if event["policy"] == p] for p in range(len(manifest["policies"]))]
    per_policy = [[*mine, _all_of(mine)] if len(mine) > 1 else mine for mine in per_policy]
    rows = []
    for label, mine in zip(manifest["policies"], per_policy, strict=True):
        for event, first in zip(mine, per_policy[0], strict=True):
            rows.append(_task_result(label, event, first, rounds, tokens, manifest["layers"]))
    return EvaluationResults(summarise(run_dir), rows)


def _all_of(events: list[Event]) -> Event:
    """The events of one policy as if they were of one task."""
    return {
        "policy": events[0]["policy"],
        "task": ALL,
        "metric": events[0]["metric"] if len({event["metric"] for event in events}) == 1 else "each task's own",
        "first_prompt": events[0]["first_prompt"],
        "prompts": sum(event["prompts"] for event in events),
        "scores": [score for event in events for score in event["scores"]],
        "items": [item for event in events for item in event["items"]],
    }


def _task_result(label: str, event: Event, first: Event, rounds: pa.Table, tokens: pa.Table, layers: int) -> TaskResult:
    if event["items"] != first["items"]:
        raise RunLogError(f"task {event['task']}: policies were asked different items; run the evaluation again")
    accuracy = mean_interval(event["scores"])
    difference = paired_difference(event["scores"], first["scores"])
    mine, reference = _rows_of(rounds, event), _rows_of(rounds, first)
    block_s = _seconds(mine, GenerationPhase.PREFILL)
    token_s = _seconds(mine, GenerationPhase.DECODE).reshape(-1, layers).sum(axis=1)
    cut = paired_cut_interval(prompt_sums_s(mine), prompt_sums_s(reference))
    kept_fraction, dropped_mass = kept_and_dropped(_rows_of(tokens, event))
    return TaskResult(
        policy=label,
        task=event["task"],
        metric=event["metric"],
        items=len(event["items"]),
        accuracy=accuracy.mean,
        accuracy_low=_known(accuracy.low),
        accuracy_high=_known(accuracy.high),
        difference=difference.mean,
        difference_low=_known(difference.low),
        difference_high=_known(difference.high),
        gained=difference.gained,
        lost=difference.lost,
        prompts=event["prompts"],
        prefill_block_p50_s=_percentile(block_s, 50),
        prefill_block_p95_s=_percentile(block_s, 95),
        prefill_block_sum_s=float(block_s.sum()),
        prefill_cut=_known(cut.cut),
        prefill_cut_low=_known(cut.low),
        prefill_cut_high=_known(cut.high),
        decode_token_rounds_p50_s=_percentile(token_s, 50),
        decode_sum_s=float(token_s.sum()),
        kept_fraction=_known(kept_fraction),
        dropped_mass=_known(dropped_mass),
    )


def _rows_of(table: pa.Table, event: Event) -> pa.Table:
    first = event["first_prompt"]
    mine = pc.equal(table["policy"], event["policy"])
    mine = pc.and_(mine, pc.greater_equal(table["prompt"], first))
    return table.filter(pc.and_(mine, pc.less(table["prompt"], first + event["prompts"])))


def _seconds(rounds: pa.Table, phase: GenerationPhase) -> Floats:
    seconds: Floats = rounds.filter(pc.equal(rounds["phase"], int(phase)))[EMULATED_ROUND].to_numpy() / 1e9
    return seconds


def _percentile(values: Floats, percent: float) -> float | None:
    return float(np.percentile(values, percent)) if len(values) else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
