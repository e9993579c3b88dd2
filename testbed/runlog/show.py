"""What `testbed logs show` says of a run, for people and for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from testbed.errors import RunLogError
from testbed.runlog.breakdown import NodeLoad, PhaseTimes, node_loads, phase_times
from testbed.runlog.catalog import Run, State, describe_run
from testbed.runlog.reader import read_manifest
from testbed.runlog.summary import exact_summary, summary_of

Joules = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class ShownPolicy:
    """One policy of a run."""

    index: int
    policy: str
    valid: bool | None  # None: the run was not summed up
    orphaned: int
    routed: int  # tokens times layers
    joule_per_token_measured: Joules | None  # by device, above what it draws at rest; None: no board told
    phases: list[PhaseTimes]
    nodes: list[NodeLoad]


@dataclass(frozen=True, slots=True)
class Shown:
    """A run and where its time went. Times are emulated milliseconds."""

    run: Run
    emulated: bool
    exact: bool
    rows: int
    policies: list[ShownPolicy]

    @property
    def invalid(self) -> bool:
        return any(policy.valid is False for policy in self.policies)

    def document(self) -> dict[str, Any]:
        """For machines."""
        facts = {"run": self.run.run, "directory": str(self.run.directory), "state": self.run.state.value}
        what = {"emulated": self.emulated, "compute": self.run.compute, "links": self.run.channel, "exact": self.exact}
        lost = {"losses": None if self.run.losses is None else self.run.losses._asdict()}
        return {**facts, **what, **lost, "rows": self.rows, "policies": [asdict(policy) for policy in self.policies]}

    def notes(self) -> list[str]:
        """What one must know beside the figures."""
        stretched = (
            "emulated ms: real time divided by the run's dilation, but for the BS's own compute (select, group, "
            "quantise, send, dequantise, combine, record), which is as it was; a whole round is divided as one"
            if self.emulated
            else "ms as measured"
        )
        how = "quantiles of the rows themselves" if self.exact else "quantiles from the run's summary, within 1 %"
        notes = [
            f"times: {stretched}; {how}",
            "down, up: one way, inferred from two clocks; ± is the most by which any of them can be wrong",
            "BS send: of one node; the BS's other phases are of a whole round. there and back holds down to up",
            f"compute: {self.run.compute or 'unknown'}; links: {self.run.channel or 'unknown'}",
        ]
        if any(policy.joule_per_token_measured for policy in self.policies):
            notes.append("J/token: measured by the board, less what it draws at rest, prefill and decode together")
        return [*self.warnings(), *notes]

    def warnings(self) -> list[str]:
        warnings = []
        if self.run.state is State.ABORTED:
            warnings.append("ABORTED: the run ended before its last prompt; these are the rounds until then")
        if self.run.state is State.RUNNING:
            warnings.append("RUNNING: the run is being recorded; these are the rounds until now")
        if self.run.losses:
            warnings.append(f"INCOMPLETE: rows of rounds and tokens {self.run.losses}; these are the others")
        if self.invalid:
            names = ", ".join(policy.policy for policy in self.policies if policy.valid is False)
            warnings.append(f"INVALID: {names}: too many orphaned tokens, or rounds that overran their emulated time")
        return warnings


def open_run(run_dir: Path, policies: Sequence[int]) -> tuple[Run, dict[str, Any]]:
    """A run's facts and its manifest; raises RunLogError where it cannot be read or has no such policies."""
    manifest, run = read_manifest(run_dir), describe_run(run_dir)
    if run.problem is not None:
        raise RunLogError(run.problem)
    for index in policies:
        if not 0 <= index < len(manifest["policies"]):
            listed = ", ".join(f"{number} {name}" for number, name in enumerate(manifest["policies"]))
            raise RunLogError(f"--policy {index}: {run_dir.name} has {listed}")
    return run, manifest


def show_run(run_dir: Path, only: int | None, results: Mapping[str, Any] | None, *, exact: bool) -> Shown:
    """The run in `run_dir`; `only` one of its policies, or all; `results` as `testbed run` keeps them.

    Raises RunLogError where it is no run, has no rows, or no such policy.
    """
    run, manifest = open_run(run_dir, [] if only is None else [only])
    names: list[str] = manifest["policies"]
    summary = exact_summary(run_dir) if exact else summary_of(run_dir)
    rows: Sequence[Mapping[str, Any]] = (results or {}).get("rows", ())
    policies = []
    for index in range(len(names)) if only is None else [only]:
        figures = rows[index] if index < len(rows) else {}
        counts = [counts for counts in summary.phases if counts.policy == index]
        policies.append(
            ShownPolicy(
                index,
                names[index],
                figures.get("valid"),
                sum(phase.orphaned for phase in counts),
                sum(phase.routed for phase in counts),
                figures.get("joule_per_token_measured"),
                list(phase_times(summary, index, manifest["devices"])),
                list(node_loads(summary, index, manifest["devices"])),
            )
        )
    emulated = bool(manifest["emulated"] or manifest["config"].get("radio"))
    return Shown(run, emulated, exact, summary.rows, policies)
