"""Policies of one run or of several, prompt by prompt: what was saved, and what it cost in quality."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from testbed.errors import RunLogError
from testbed.experiment.statistics import CutInterval, paired_cut_interval
from testbed.runlog.catalog import State
from testbed.runlog.histogram import Floats
from testbed.runlog.reader import read_events
from testbed.runlog.schema import GenerationPhase
from testbed.runlog.show import open_run
from testbed.runlog.summary_rows import batches, log_parts

COLUMNS = ("policy", "prompt", "phase", "layer", "device", "dilation", "round_ns")
SAME = {"text_sha256": "another text", "seed": "another seed", "layers": "another model"}
CHANNEL = ("factor", "down_bits_per_s", "up_bits_per_s")
RESAMPLES = 10_000
Facts = Mapping[str, Any]


class PromptTime(NamedTuple):
    """Of a prompt's rounds in one phase."""

    seconds: float = 0.0  # emulated
    passes: int = 0  # through the model
    rounds: int = 0

    def with_more(self, more: PromptTime) -> PromptTime:
        return PromptTime(self.seconds + more.seconds, self.passes + more.passes, self.rounds + more.rounds)


Times = dict[tuple[int, int, int], PromptTime]  # by policy, prompt, phase


class Interval(NamedTuple):
    """A figure and its 95 % interval; NaN where it is unknown."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Compared:
    """One policy of one run beside the reference; NaN where the pairs have none of it."""

    run: str
    policy: str
    index: int
    state: str
    prompts: int  # done by both
    prefill: CutInterval  # 1 - sum of emulated times of the prefill's rounds / the same sum of the reference
    decode: CutInterval  # likewise of the rounds of one decoded token, averaged per prompt
    perplexity: float
    perplexity_more: Interval  # than the reference over the same prompts

    def document(self) -> dict[str, Any]:
        """For machines."""
        intervals = {name: getattr(self, name)._asdict() for name in ("prefill", "decode", "perplexity_more")}
        return {**asdict(self), **intervals}


class Side(NamedTuple):
    """One policy of one run: what is compared."""

    run_dir: Path
    number: int  # of the policy
    policy: str
    state: str
    manifest: Facts
    channels: Mapping[int, Facts]  # by prompt
    scored: Mapping[int, tuple[float, int]]  # by prompt: nats, predicted tokens
    prompts: frozenset[int]  # done to their end
    times: Times


def compare_runs(run_dirs: Sequence[Path], only: Sequence[int]) -> list[Compared]:
    """Every policy of every run, or `only` these of each, beside the first of the first.

    Raises RunLogError where there is nothing to compare, or where two did not have the same prompts, model and channel.
    """
    sides = [side for run_dir in run_dirs for side in _sides(run_dir, only)]
    if len(sides) < 2:
        raise RunLogError(f"{run_dirs[0].name}: one policy alone; name a second run, or another --policy")
    return [_compared(side, sides[0]) for side in sides]


def _sides(run_dir: Path, only: Sequence[int]) -> Iterator[Side]:
    run, manifest = open_run(run_dir, only)
    events, times, names = read_events(run_dir), prompt_times_s(run_dir), manifest["policies"]
    for index in only or range(len(names)):
        mine = [event for event in events if event.get("policy") == index]
        yield Side(
            run_dir, index, names[index], run.state.value, manifest,
            {event["prompt"]: event for event in mine if event["kind"] == "channel"},
            {event["prompt"]: (event["nats"], event["tokens"]) for event in mine if event["kind"] == "scored"},
            frozenset(event["prompt"] for event in mine if event["kind"] in ("scored", "generated")),
            times,
        )  # fmt: skip


def prompt_times_s(run_dir: Path) -> Times:
    """What the rounds of each (policy, prompt, phase) took."""
    times: Times = {}
    for table in batches(log_parts(run_dir, "rounds"), COLUMNS):
        for key, more in _sums(table):
            times[key] = times.get(key, PromptTime()).with_more(more)
    return times


def _sums(table: pa.Table) -> Iterator[tuple[tuple[int, int, int], PromptTime]]:
    column = {name: table[name].to_numpy() for name in table.column_names}
    once_R = column["device"] == 0
    dilation_R = column["dilation"][once_R] if "dilation" in column else 1.0
    seconds_R = np.nan_to_num(column["round_ns"][once_R] / dilation_R / 1e9)
    key_R3 = np.column_stack([column[name][once_R].astype(np.int64) for name in ("policy", "prompt", "phase")])
    key_G3, group_R = np.unique(key_R3, axis=0, return_inverse=True)
    group_R = group_R.reshape(-1)
    sum_G = np.bincount(group_R, seconds_R, minlength=len(key_G3))
    first_R = column["layer"][once_R] == column["layer"].min(initial=np.iinfo(np.uint16).max)
    passes_G = np.bincount(group_R[first_R], minlength=len(key_G3))
    rounds_G = np.bincount(group_R, minlength=len(key_G3))
    taken = map(PromptTime, sum_G.tolist(), passes_G.tolist(), rounds_G.tolist())
    yield from zip(map(tuple, key_G3.tolist()), taken, strict=True)


def _compared(side: Side, reference: Side) -> Compared:
    _refuse_what_does_not_pair(side, reference)
    prompts = sorted(side.prompts & reference.prompts)
    if not prompts:
        raise RunLogError(f"{_name(side)} and {_name(reference)} finished no prompt in common; nothing can be compared")
    prefill, decode = (
        paired_cut_interval(*_pairs(side, reference, prompts, phase, per_pass=phase is GenerationPhase.DECODE))
        for phase in GenerationPhase
    )
    scored = [prompt for prompt in prompts if prompt in side.scored and prompt in reference.scored]
    mine, theirs = (np.array([of.scored[prompt] for prompt in scored]).reshape(-1, 2) for of in (side, reference))
    return Compared(
        side.run_dir.name, side.policy, side.number, side.state, len(prompts), prefill, decode,
        perplexity(mine), perplexity_difference(mine, theirs),
    )  # fmt: skip


def _pairs(
    side: Side, reference: Side, prompts: Sequence[int], phase: GenerationPhase, *, per_pass: bool
) -> tuple[Floats, Floats]:
    """Seconds of the prompts of which both have all rounds; per pass where their number may differ."""
    both = [[_whole_time(of, prompt, phase) for of in (side, reference)] for prompt in prompts]
    found = [[t.seconds / t.passes if per_pass else t.seconds for t in pair if t is not None] for pair in both]
    pairs_P2 = np.array([pair for pair in found if len(pair) == 2]).reshape(-1, 2)
    return pairs_P2[:, 0], pairs_P2[:, 1]


def _whole_time(side: Side, prompt: int, phase: GenerationPhase) -> PromptTime | None:
    """None where there is none, or the log lost a round of it."""
    time = side.times.get((side.number, prompt, phase))
    layers = side.manifest.get("layers")
    return time if time is not None and (layers is None or time.rounds == time.passes * layers) else None


def perplexity(scored_P2: Floats) -> float:
    """Of prompts given as (nats, predicted tokens); NaN of none."""
    nats, tokens = scored_P2.sum(axis=0)
    return math.exp(nats / tokens) if tokens else math.nan


def perplexity_difference(scored_P2: Floats, reference_P2: Floats, seed: int = 0) -> Interval:
    """How much higher than the reference's, with the percentile bootstrap's 95 % interval over pairs of prompts."""
    more = perplexity(scored_P2) - perplexity(reference_P2)
    pairs = len(scored_P2)
    if pairs < 2:
        return Interval(more, math.nan, math.nan)
    drawn_RP = np.random.default_rng(seed).integers(pairs, size=(RESAMPLES, pairs))
    mine_R2, theirs_R2 = (side_P2[drawn_RP].sum(axis=1) for side_P2 in (scored_P2, reference_P2))
    more_R = np.exp(mine_R2[:, 0] / mine_R2[:, 1]) - np.exp(theirs_R2[:, 0] / theirs_R2[:, 1])
    low, high = np.percentile(more_R, [2.5, 97.5])
    return Interval(more, float(low), float(high))


def _refuse_what_does_not_pair(side: Side, reference: Side) -> None:
    between = f"{_name(side)} and {_name(reference)} cannot be paired"
    ours, theirs = side.manifest, reference.manifest
    for key, what in SAME.items():
        if ours.get(key) != theirs.get(key):
            raise RunLogError(f"{between}: {what} ({key}); compare runs of one workload")
    if ours["model"].get("hash") != theirs["model"].get("hash"):
        raise RunLogError(f"{between}: another model ({ours['model']['name']}, {theirs['model']['name']})")
    if ours["config"].get("workload") != theirs["config"].get("workload"):
        raise RunLogError(f"{between}: prompts of another length or number ([workload] in their config.toml)")
    for prompt in sorted(side.prompts & reference.prompts):
        if _channel(side, prompt) != _channel(reference, prompt):
            raise RunLogError(f"{between}: prompt {prompt} met another channel; compare runs of one [radio] and seed")


def _channel(side: Side, prompt: int) -> list[Any]:
    return [side.channels.get(prompt, {}).get(name) for name in CHANNEL]


def _name(side: Side) -> str:
    return f"{side.run_dir.name} {side.policy}"


def aborted(compared: Sequence[Compared]) -> list[str]:
    """Names of the runs that ended before their last prompt."""
    return sorted({one.run for one in compared if one.state == State.ABORTED.value})
