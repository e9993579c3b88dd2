"""Adds up rows and events of a run into the figures of its view.

P policies, N devices, S statuses, R rows, W rows of the last rounds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from testbed.runlog.schema import Status
from testbed.watch.figures import RECENT_ROUNDS, Figures, Incident, NodeFigures, PolicyProgress, Requests, Telemetry
from testbed.watch.recent import RECENT_COLUMNS, Recent

OF_ROUNDS = RECENT_COLUMNS
OF_TOKENS = ("policy", "expert", "asked", "weight", "kept", "orphaned")
INCIDENTS = ("node_lost", "node_heard_again", "node_refused", "request_rejected", "broken_message", "key_refused")
SHOWN_INCIDENTS = 5
PRESENT_AFTER = {"node_joined": True, "node_heard_again": True, "node_lost": False}

Row = NDArray[Any]


class Tally:
    """Takes rows of whole rounds and events in any number of pieces."""

    def __init__(self, run: str, manifest: Mapping[str, Any]) -> None:
        self._run, self._manifest = run, manifest
        self._policies, self._devices = _told_apart(manifest["policies"]), list(manifest["devices"])
        policies, devices = len(self._policies), len(self._devices)
        self._requests_PNS = np.zeros((policies, devices, len(Status)), np.int64)
        self._bytes_2PN = np.zeros((2, policies, devices), np.int64)
        self._rounds_P, self._tokens_P = np.zeros((2, policies), np.int64)
        self._pairs_P, self._kept_P, self._orphaned_P = np.zeros((3, policies), np.int64)
        self._mass_P, self._dropped_P = np.zeros((2, policies))
        self._first_layer: int | None = None
        self._recent: pa.Table | None = None
        self._done: set[tuple[int, int]] = set()  # policy, prompt
        self._present: dict[str, bool] = {}
        self._joins: dict[str, int] = {}
        self._told: dict[str, Telemetry] = {}
        self._incidents: deque[Incident] = deque(maxlen=SHOWN_INCIDENTS)
        self._epoch_ns: int | None = None  # realtime minus monotonic clock of the BS, by its newest event

    def add_rounds(self, table: pa.Table) -> None:
        """Rows of `rounds`."""
        policy_R, device_R, status_R, layer_R = (_column(table, c) for c in ("policy", "device", "status", "layer"))
        np.add.at(self._requests_PNS, (policy_R, device_R, status_R), 1)
        for bytes_PN, name in zip(self._bytes_2PN, ("bytes_down", "bytes_up"), strict=True):
            np.add.at(bytes_PN, (policy_R, device_R), _column(table, name).astype(np.int64))
        if self._first_layer is None:
            self._first_layer = int(layer_R[0])
        of_round_R = device_R == 0
        np.add.at(self._rounds_P, policy_R[of_round_R], 1)
        entered_R = of_round_R & (layer_R == self._first_layer)
        np.add.at(self._tokens_P, policy_R[entered_R], _column(table, "tokens")[entered_R].astype(np.int64))
        together = table if self._recent is None else pa.concat_tables([self._recent, table], promote_options="default")
        self._recent = together.slice(max(0, len(together) - RECENT_ROUNDS * len(self._devices)))

    def add_tokens(self, table: pa.Table) -> None:
        """Rows of `tokens`. Runs before `asked` was kept substituted nothing."""
        policy_R = _column(table, "policy")
        expert_RK, kept_RK, weight_RK = (_lists(table, name) for name in ("expert", "kept", "weight"))
        own_RK = _lists(table, "asked") == expert_RK if "asked" in table.column_names else np.ones_like(kept_RK)
        weight_RK = weight_RK.astype(np.float64)
        for total_P, value_R in (
            (self._pairs_P, np.full(len(policy_R), kept_RK.shape[1])),
            (self._kept_P, kept_RK.sum(axis=1)),
            (self._orphaned_P, _column(table, "orphaned").astype(np.int64)),
            (self._mass_P, weight_RK.sum(axis=1)),
            (self._dropped_P, (weight_RK * ~(kept_RK & own_RK)).sum(axis=1)),
        ):
            np.add.at(total_P, policy_R, value_R)

    def add_events(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Events, oldest first; kinds that are not known change nothing."""
        for event in events:
            kind, device = event["kind"], event.get("device")
            if "realtime_ns" in event and "monotonic_ns" in event:
                self._epoch_ns = event["realtime_ns"] - event["monotonic_ns"]
            if kind in ("scored", "generated"):
                self._done.add((event["policy"], event["prompt"]))
            if kind in PRESENT_AFTER and device is not None:
                self._present[device] = PRESENT_AFTER[kind]
            if kind == "node_joined":
                self._joins[event["device"]] = self._joins.get(event["device"], 0) + 1
            if kind in ("power", "telemetry"):
                self._told[event["device"]] = _newest(self._told.get(event["device"], Telemetry()), event)
            if kind in INCIDENTS or (kind == "node_joined" and self._joins[event["device"]] > 1):
                self._incidents.append(_incident(event))

    def figures(self, state: str) -> Figures:
        """All of it so far."""
        model, recent = self._manifest.get("model"), None
        if self._recent is not None:
            recent = Recent(self._recent, len(self._devices))
        return Figures(
            run=self._run,
            state=state,
            model=f"{model['name']} ({model['type']})" if model else None,
            links=self._manifest.get("links"),
            last=None if recent is None else recent.last_round(self._policies, self._epoch_ns),
            policies=tuple(self._progress(index, policy) for index, policy in enumerate(self._policies)),
            nodes=tuple(self._node(index, device, recent) for index, device in enumerate(self._devices)),
            incidents=tuple(self._incidents),
        )

    def _progress(self, index: int, policy: str) -> PolicyProgress:
        return PolicyProgress(
            policy=policy,
            prompts_done=sum(of_policy == index for of_policy, _ in self._done),
            prompts=_prompts(self._manifest),
            rounds=int(self._rounds_P[index]),
            tokens=int(self._tokens_P[index]),
            pairs=int(self._pairs_P[index]),
            kept_pairs=int(self._kept_P[index]),
            gate_mass=float(self._mass_P[index]),
            dropped_mass=float(self._dropped_P[index]),
            orphaned_tokens=int(self._orphaned_P[index]),
        )

    def _node(self, index: int, device: str, recent: Recent | None) -> NodeFigures:
        emulated = self._manifest.get("emulated") or {}
        return NodeFigures(
            device=device,
            present=self._present.get(device),
            joins=self._joins.get(device, 0),
            emulated=device in emulated.get("compute_flops_per_s", emulated),  # older runs: by speed
            telemetry=self._told.get(device, Telemetry()),
            requests=tuple(self._requests_of(policy, index) for policy in range(len(self._policies))),
            last=None if recent is None else recent.requests(index),
        )

    def _requests_of(self, policy: int, device: int) -> Requests:
        count_S = self._requests_PNS[policy, device].tolist()
        weight_2 = self._bytes_2PN[:, policy, device].tolist()
        return Requests(self._policies[policy], *count_S[Status.ANSWERED :], *weight_2)


def _newest(told: Telemetry, event: Mapping[str, Any]) -> Telemetry:
    """A sample replaces figures of its names; the names of a run are bounded by who wrote its log."""
    at_ns = event.get("realtime_ns")
    told = replace(told, at_realtime_s=None if at_ns is None else at_ns / 1e9)
    if event["kind"] == "power":
        return replace(told, power_w=event["power_w"])
    return replace(told, figures=dict(told.figures) | {k: v for s in event["samples"] for k, v in s["figures"].items()})


def _told_apart(policies: list[str]) -> list[str]:
    """Those of the same name by their place among all."""
    return [f"{place} {name}" if policies.count(name) > 1 else name for place, name in enumerate(policies)]


def _prompts(manifest: Mapping[str, Any]) -> int | None:
    """Of each policy."""
    work = manifest["config"].get("workload")
    if work is None:
        return None
    return int(work["score_prompts"] + (work["generate_prompts"] if work["new_tokens"] else 0))


def _incident(event: Mapping[str, Any]) -> Incident:
    at_ns = event.get("realtime_ns")
    what = event.get("how") or event.get("reason")
    return Incident(None if at_ns is None else at_ns / 1e9, event["kind"], event.get("device"), what)


def _column(table: pa.Table, name: str) -> Row:
    values: Row = table[name].to_numpy()
    return values


def _lists(table: pa.Table, name: str) -> Row:
    values: Row = pc.list_flatten(table[name]).to_numpy(zero_copy_only=False)
    return values.reshape(len(table), -1)
