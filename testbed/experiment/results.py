"""What a run showed, read back from its log: one row per policy."""

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
from testbed.experiment.emulated_time import (
    OVERRUN_ABOVE,
    OVERRUNS_ALLOWED,
    eq8_sum_s,
    overhead_of_rounds,
    with_emulated_times,
)
from testbed.experiment.policy_rows import Cuts, Taken, cuts, round_s
from testbed.experiment.run_energy import Board, JoulePerToken, joule_per_token, measured_boards
from testbed.experiment.whole_prompts import only_whole_prompts
from testbed.runlog.reader import Losses, losses, read_events, read_manifest, read_table
from testbed.runlog.schema import TABLES, GenerationPhase, Status

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy's figures. Seconds, fractions, megabytes (1e6 bytes); NaN where the workload had none of it."""

    policy: str
    params: dict[str, Any]
    bandwidth: str  # how the band was shared out, and how often
    period: str
    prefill_block_p50_s: float
    prefill_block_p95_s: float
    prefill_block_sum_s: float
    prefill_cut: float  # 1 - sum of block times / the same sum under the first policy, over the same prompts
    prefill_cut_low: float  # ... and its 95 % interval, by a bootstrap over the prompts, paired
    prefill_cut_high: float
    eq8_sum_s: float
    eq8_cut: float  # likewise of the paper's Eq. 8 with the true channel: every token waits for its own slowest device
    decode_sum_s: float  # of the expert rounds of all generated tokens
    decode_cut: float  # likewise of those
    decode_rounds_p50_s: float  # the expert rounds of one token, all layers
    decode_rounds_p95_s: float
    decode_token_p50_s: float  # the same and the base station's own compute
    decode_token_p95_s: float
    perplexity: float
    accuracy: float
    kept_fraction: float  # of the pairs (token, expert) that the gate chose
    dropped_mass: float  # share of the gate's weight that its own expert did not compute
    megabytes_down: float
    megabytes_up: float
    late: int  # requests (round, device) not answered in time by a node that was there
    lost: int  # requests whose node went away, refused or sent a broken reply
    orphaned: int  # tokens of a block without any expert's output
    orphaned_fraction: float
    overhead_p50: float  # of a round: real time beyond the emulated one, as a share of that
    overrun_fraction: float  # rounds in which that share is above 10 %
    valid: bool
    joule_per_token_measured: dict[str, float | None] | None  # by device, what it drew at rest taken off
    joule_per_token_modelled: dict[str, float | None] | None  # down, compute, up, total; of all devices


@dataclass(frozen=True, slots=True)
class Results:
    """A run's table."""

    run: str
    run_dir: Path
    emulated: dict[str, Any]
    links: str
    rows: list[PolicyResult]
    boards: dict[str, Board]  # those that reported power of their own
    losses: Losses  # rows of the log; where there are any, figures are of the prompts that lost none

    @property
    def valid(self) -> bool:
        return all(row.valid for row in self.rows)

    def document(self) -> dict[str, Any]:
        """For machines: the last line of `testbed run --json`."""
        return {
            "run": self.run,
            "directory": str(self.run_dir),
            "emulated": self.emulated,
            "links": self.links,
            "valid": self.valid,
            "losses": self.losses._asdict(),
            "rows": [asdict(row) for row in self.rows],
            "boards": {name: board.at_rest() for name, board in self.boards.items()},
        }


class IncompleteRunError(RunLogError):
    """Everything was run, and not everything could be kept. What was, and its figures, are in `results`."""

    def __init__(self, text: str, results: Results) -> None:
        super().__init__(text)
        self.results = results


def summarise(run_dir: Path) -> Results:
    """Everything the table says, from the run's own log. Raises RunLogError where that is damaged."""
    manifest = read_manifest(run_dir)
    rounds, tokens, events = read_table(run_dir, "rounds"), read_table(run_dir, "tokens"), read_events(run_dir)
    rounds = with_emulated_times(run_dir, rounds, manifest, events)
    lost = losses(run_dir, *TABLES)
    if lost:
        of_rounds = losses(run_dir, "rounds")
        rounds, tokens = only_whole_prompts(rounds, tokens, of_rounds, len(manifest["devices"]))
    # Joules are of all that was done, tokens only of what was recorded.
    boards = {} if lost else measured_boards(rounds, manifest, events)
    energy = joule_per_token(rounds, manifest, events, boards)
    invalid_above = float(manifest["config"]["on_loss"]["invalid_above"])
    taken = [Taken.of(index, rounds, tokens, events) for index in range(len(manifest["config"]["policy"]))]
    rows = [
        _policy_result(
            spec, _params(manifest, index), mine, cuts(mine, taken[0]), len_layers=manifest["layers"],
            invalid_above=invalid_above, energy=energy[index], only_recorded=bool(lost),
        )
        for index, (spec, mine) in enumerate(zip(manifest["config"]["policy"], taken, strict=True))
    ]  # fmt: skip
    return Results(run_dir.name, run_dir, manifest["emulated"], manifest["links"], rows, boards, lost)


def _params(manifest: dict[str, Any], index: int) -> dict[str, Any]:
    """As the policy itself had them: one that is steered has no strength of its own. Older runs: the run file's."""
    if "policy_params" in manifest:
        return dict(manifest["policy_params"][index])
    spec = manifest["config"]["policy"][index]
    return {key: value for key, value in spec.items() if key not in ("name", "bandwidth", "period")}


def _policy_result(
    spec: dict[str, Any],
    params: dict[str, Any],
    taken: Taken,
    cut: Cuts,
    *,
    len_layers: int,
    invalid_above: float,
    energy: JoulePerToken,
    only_recorded: bool,
) -> PolicyResult:
    rounds, tokens, events = taken
    if only_recorded:
        recorded = set(rounds["prompt"].to_pylist())
        events = [event for event in events if event.get("prompt") in recorded]
    scored = [event for event in events if event["kind"] == "scored"]
    predicted = sum(event["tokens"] for event in scored)
    token_s = np.array([s for event in events if event["kind"] == "generated" for s in event["token_s"]])
    block_s = round_s(rounds, GenerationPhase.PREFILL)
    decode_rounds_s = round_s(rounds, GenerationPhase.DECODE).reshape(-1, len_layers).sum(axis=1)
    real_rounds_s = round_s(rounds, GenerationPhase.DECODE, "round_ns").reshape(-1, len_layers).sum(axis=1)
    if len(token_s) == len(real_rounds_s):  # else a prompt of one token was a decoded one by its looks
        token_s = token_s - real_rounds_s + decode_rounds_s  # the base station's own compute is not stretched
    overhead = overhead_of_rounds(rounds)
    overruns = float((overhead > OVERRUN_ABOVE).mean()) if len(overhead) else 0.0
    status = rounds["status"].to_numpy()
    orphaned = int(pc.sum(tokens["orphaned"]).as_py() or 0)
    orphaned_fraction = orphaned / max(1, tokens.num_rows)
    kept_fraction, dropped_mass = kept_and_dropped(tokens)
    return PolicyResult(
        policy=spec["name"],
        params=params,
        bandwidth=spec.get("bandwidth", "even"),
        period=spec.get("period", "block"),
        prefill_block_p50_s=_percentile(block_s, 50),
        prefill_block_p95_s=_percentile(block_s, 95),
        prefill_block_sum_s=float(block_s.sum()),
        eq8_sum_s=eq8_sum_s(tokens, events),
        eq8_cut=cut.eq8,
        decode_sum_s=taken.decode_s,
        decode_cut=cut.decode,
        prefill_cut=cut.prefill.cut,
        prefill_cut_low=cut.prefill.low,
        prefill_cut_high=cut.prefill.high,
        decode_rounds_p50_s=_percentile(decode_rounds_s, 50),
        decode_rounds_p95_s=_percentile(decode_rounds_s, 95),
        decode_token_p50_s=_percentile(token_s, 50),
        decode_token_p95_s=_percentile(token_s, 95),
        perplexity=math.exp(sum(e["nats"] for e in scored) / predicted) if predicted else math.nan,
        accuracy=sum(e["correct"] for e in scored) / predicted if predicted else math.nan,
        kept_fraction=kept_fraction,
        dropped_mass=dropped_mass,
        megabytes_down=float(rounds["bytes_down"].to_numpy().sum()) / 1e6,
        megabytes_up=float(rounds["bytes_up"].to_numpy().sum()) / 1e6,
        late=int((status == Status.LATE).sum()),
        lost=int(np.isin(status, (Status.LOST, Status.REJECTED, Status.INVALID)).sum()),
        orphaned=orphaned,
        orphaned_fraction=orphaned_fraction,
        overhead_p50=_percentile(overhead, 50),
        overrun_fraction=overruns,
        valid=orphaned_fraction <= invalid_above and overruns <= OVERRUNS_ALLOWED,
        joule_per_token_measured=energy.measured,
        joule_per_token_modelled=energy.modelled,
    )


def kept_and_dropped(tokens: pa.Table) -> tuple[float, float]:
    """Share of pairs computed, and share of the gate's weight whose own expert was not: dropped, or substituted.

    NaN of no tokens.
    """
    if tokens.num_rows == 0:
        return math.nan, math.nan
    kept_P = pc.list_flatten(tokens["kept"]).to_numpy()
    asked = tokens["asked" if "asked" in tokens.column_names else "expert"]  # runs before that substituted nothing
    own_P = pc.list_flatten(asked).to_numpy() == pc.list_flatten(tokens["expert"]).to_numpy()
    weight_P = pc.list_flatten(tokens["weight"]).to_numpy().astype(np.float64)
    return float(kept_P.mean()), float(weight_P[~(kept_P & own_P)].sum() / weight_P.sum())


def _percentile(values: Floats, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else math.nan
