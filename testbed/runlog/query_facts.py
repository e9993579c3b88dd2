"""Facts of runs that are not rows, as Arrow tables: what each run was, its events, what its nodes told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import timezone
from typing import Any

import pyarrow as pa

from testbed.runlog.catalog import FIGURES, Run
from testbed.runlog.reader import read_events
from testbed.runlog.schema import EVENTS
from testbed.wire.figures import unit_of

TEXT = ("run", pa.string())
RUNS = pa.schema(
    [
        TEXT,
        ("directory", pa.string()),
        ("began", pa.timestamp("s")),  # UTC
        ("state", pa.string()),
        ("kind", pa.string()),
        ("model", pa.string()),
        ("channel", pa.string()),
        ("compute", pa.string()),
        ("devices", pa.list_(pa.string())),
        ("policies", pa.list_(pa.string())),  # and in their order, null where the run was not summed up:
        *((name, pa.list_(pa.bool_() if name == "valid" else pa.float64())) for name in FIGURES),
        ("size_bytes", pa.int64()),
    ]
)
EVENT_ROWS = pa.schema(
    [
        TEXT,
        ("realtime_ns", pa.int64()),
        ("monotonic_ns", pa.int64()),  # the base station's
        ("kind", pa.string()),
        ("device_name", pa.string()),
        ("policy", pa.int32()),
        ("policy_name", pa.string()),
        ("prompt", pa.int32()),
        ("facts", pa.string()),  # JSON: whatever else the event says
    ]
)
TELEMETRY = pa.schema(
    [
        TEXT,
        ("device_name", pa.string()),
        ("sampled_ns", pa.int64()),  # on the base station's monotonic clock
        ("figure", pa.string()),  # its unit at its end: power_w, cpu_c, gpu_mhz, machine_cpu_percent, rss_bytes
        ("unit", pa.string()),  # °C, W, MHz, %, bytes, rpm; empty for a plain number
        ("value", pa.float64()),  # null: the sensor was off, or did not answer
        ("rail", pa.string()),  # that power_w was measured on; "sum" where rails were added up
    ]
)


def runs_table(runs: Sequence[Run]) -> pa.Table:
    """One row per run."""
    return pa.Table.from_pylist([_run_row(run) for run in runs], RUNS)


def events_table(runs: Sequence[Run]) -> pa.Table:
    """One row per rare event, oldest first within a run. Raises RunLogError where events are damaged."""
    return pa.Table.from_pylist([_event_row(run, event) for run, event in _events(runs)], EVENT_ROWS)


def telemetry_table(runs: Sequence[Run]) -> pa.Table:
    """What nodes told of temperature, power, clocks, memory and load: a row per sample and figure."""
    return pa.Table.from_pylist(list(_telemetry_rows(runs)), TELEMETRY)


def _telemetry_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    rails: dict[tuple[str, str], str | None] = {}
    for run, event in _events(runs):
        node = {"run": run.run, "device_name": event.get("device")}
        if event["kind"] == "power_rail":
            rails[run.run, event["device"]] = event["rail"]
        elif event["kind"] == "power":
            rail = rails.get((run.run, event["device"]))
            power = {"figure": "power_w", "unit": "W", "value": event["power_w"], "rail": rail}
            yield {**node, "sampled_ns": event["sampled_ns"], **power}
        elif event["kind"] == "telemetry":
            for sample in event["samples"]:
                for figure, value in sample["figures"].items():
                    told = {"figure": figure, "unit": unit_of(figure), "value": value}
                    yield {**node, "sampled_ns": sample["sampled_ns"], **told}


def _run_row(run: Run) -> dict[str, Any]:
    figures = {name: [getattr(policy, name) for policy in run.policies] for name in FIGURES}
    began = None if run.began is None else run.began.astimezone(timezone.utc).replace(tzinfo=None)
    policies = [policy.policy for policy in run.policies]
    return {**run.document(), "began": began, "policies": policies, **figures}


def _event_row(run: Run, event: dict[str, Any]) -> dict[str, Any]:
    known = {name: event.pop(name, None) for name in ("realtime_ns", "monotonic_ns", "kind", "policy", "prompt")}
    policy = known["policy"]
    name = run.policies[policy].policy if isinstance(policy, int) and policy < len(run.policies) else None
    device = event.pop("device", None)
    facts = json.dumps(event, ensure_ascii=False)
    return {**known, "run": run.run, "policy_name": name, "device_name": device, "facts": facts}


def _events(runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
    return ((run, event) for run in runs if (run.directory / EVENTS).exists() for event in read_events(run.directory))
