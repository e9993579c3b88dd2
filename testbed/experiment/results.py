"""What a run showed, read back from its log: one row per policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from rich.table import Table

from testbed.cli.output import table
from testbed.runlog.reader import read_events, read_manifest, read_table
from testbed.runlog.schema import GenerationPhase, Status

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy's figures. Seconds, fractions, megabytes (1e6 bytes); NaN where the workload had none of it."""

    policy: str
    params: dict[str, Any]
    prefill_block_p50_s: float
    prefill_block_p95_s: float
    prefill_block_sum_s: float
    prefill_cut: float  # 1 - sum of block times / the same sum under the first policy, over the same prompts
    decode_rounds_p50_s: float  # the expert rounds of one token, all layers
    decode_rounds_p95_s: float
    decode_token_p50_s: float  # the same and the base station's own compute
    decode_token_p95_s: float
    perplexity: float
    accuracy: float
    kept_fraction: float  # of the pairs (token, expert) that the gate chose
    dropped_mass: float  # share of the gate's weight that was not computed
    megabytes_down: float
    megabytes_up: float
    late: int  # requests (round, device) not answered in time by a node that was there
    lost: int  # requests whose node went away, refused or sent a broken reply
    orphaned: int  # tokens of a block without any expert's output
    orphaned_fraction: float
    valid: bool


@dataclass(frozen=True, slots=True)
class Results:
    """A run's table."""

    run: str
    run_dir: Path
    emulated: dict[str, Any]
    links: str
    rows: list[PolicyResult]

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
            "rows": [asdict(row) for row in self.rows],
        }

    def table(self) -> Table:
        """For people."""
        title = f"Run {self.run}" + ("" if self.valid else f"  {INVALID}")
        return table(title, [head for head, _ in COLUMNS], [[show(row) for _, show in COLUMNS] for row in self.rows])

    def notes(self) -> list[str]:
        """What one must know beside the table."""
        emulated = "compute, padded to each device's FLOP/s of the run file" if self.emulated else "nothing"
        return [
            f"emulated: {emulated}; links: {self.links}; everything else measured",
            "cut: of the sum of prefill block times, against topk on the same text",
            f"log: {self.run_dir}",
        ]


INVALID = "INVALID: too many tokens lost all their experts"


def _pair(low: float, high: float, unit: float = 1e3) -> str:
    return f"{low * unit:.1f} / {high * unit:.1f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _name(row: PolicyResult) -> str:
    settings = " ".join(f"{key}={value}" for key, value in row.params.items())
    return f"{row.policy} {settings}".strip() + ("" if row.valid else " INVALID")


COLUMNS: list[tuple[str, Callable[[PolicyResult], str]]] = [
    ("policy", _name),
    ("prefill\nms/block\np50 / p95", lambda r: _pair(r.prefill_block_p50_s, r.prefill_block_p95_s)),
    ("\n\ncut", lambda r: _percent(r.prefill_cut)),
    ("decode ms/token\nexpert rounds\np50 / p95", lambda r: _pair(r.decode_rounds_p50_s, r.decode_rounds_p95_s)),
    ("decode ms/token\nand BS compute\np50 / p95", lambda r: _pair(r.decode_token_p50_s, r.decode_token_p95_s)),
    ("\nper-\nplexity", lambda r: f"{r.perplexity:.3f}"),
    ("next\ntoken\nright", lambda r: _percent(r.accuracy)),
    ("\nexperts\nkept", lambda r: _percent(r.kept_fraction)),
    ("gate\nmass\ndropped", lambda r: _percent(r.dropped_mass)),
    ("MB\ndown\n/ up", lambda r: _pair(r.megabytes_down, r.megabytes_up, 1)),
    ("late\n/ lost\n/ orphaned", lambda r: f"{r.late} / {r.lost} / {r.orphaned}"),
]


def summarise(run_dir: Path) -> Results:
    """Everything the table says, from the run's own log. Raises RunLogError where that is damaged."""
    manifest = read_manifest(run_dir)
    rounds, tokens, events = read_table(run_dir, "rounds"), read_table(run_dir, "tokens"), read_events(run_dir)
    invalid_above = float(manifest["config"]["on_loss"]["invalid_above"])
    rows: list[PolicyResult] = []
    for index, spec in enumerate(manifest["config"]["policy"]):
        mine = [event for event in events if event.get("policy") == index]
        reference_s = rows[0].prefill_block_sum_s if rows else None
        row = _policy_result(
            spec, _only(rounds, index), _only(tokens, index), mine, len_layers=manifest["layers"],
            reference_s=reference_s, invalid_above=invalid_above,
        )  # fmt: skip
        rows.append(row)
    return Results(run_dir.name, run_dir, manifest["emulated"], manifest["links"], rows)


def _only(table: pa.Table, policy: int) -> pa.Table:
    return table.filter(pc.equal(table["policy"], policy))


def _policy_result(
    spec: dict[str, Any],
    rounds: pa.Table,
    tokens: pa.Table,
    events: list[dict[str, Any]],
    *,
    len_layers: int,
    reference_s: float | None,
    invalid_above: float,
) -> PolicyResult:
    scored = [event for event in events if event["kind"] == "scored"]
    predicted = sum(event["tokens"] for event in scored)
    token_s = np.array([s for event in events if event["kind"] == "generated" for s in event["token_s"]])
    block_s = _round_s(rounds, GenerationPhase.PREFILL)
    decode_s = _round_s(rounds, GenerationPhase.DECODE)
    decode_rounds_s = decode_s.reshape(-1, len_layers).sum(axis=1)
    status = rounds["status"].to_numpy()
    orphaned = int(pc.sum(tokens["orphaned"]).as_py() or 0)
    orphaned_fraction = orphaned / max(1, tokens.num_rows)
    kept_fraction, dropped_mass = _kept(tokens)
    return PolicyResult(
        policy=spec["name"],
        params={key: value for key, value in spec.items() if key != "name"},
        prefill_block_p50_s=_percentile(block_s, 50),
        prefill_block_p95_s=_percentile(block_s, 95),
        prefill_block_sum_s=float(block_s.sum()),
        prefill_cut=1 - float(block_s.sum()) / reference_s if reference_s else 0.0 if len(block_s) else math.nan,
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
        valid=orphaned_fraction <= invalid_above,
    )


def _round_s(rounds: pa.Table, phase: GenerationPhase) -> Floats:
    """Seconds of each expert round of a phase, once per round, in their order."""
    chosen = rounds.filter(pc.and_(pc.equal(rounds["phase"], int(phase)), pc.equal(rounds["device"], 0)))
    seconds: Floats = chosen["round_ns"].to_numpy() / 1e9
    return seconds


def _kept(tokens: pa.Table) -> tuple[float, float]:
    """Share of pairs kept, and share of the gate's weight that was not."""
    if tokens.num_rows == 0:
        return math.nan, math.nan
    kept_P = pc.list_flatten(tokens["kept"]).to_numpy()
    weight_P = pc.list_flatten(tokens["weight"]).to_numpy().astype(np.float64)
    return float(kept_P.mean()), float(weight_P[~kept_P].sum() / weight_P.sum())


def _percentile(values: Floats, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else math.nan
