"""Made-up rounds in a real log: the truth of them is known; guesses of the offset are wrong within their bound."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import Status

BOUND_NS = 40_000
POLICIES = ["topk", "wlr θ=0.1"]


@dataclass
class Recorded:
    """The run's folder and what is true of its rounds: when they began and ended, on the base station's clock."""

    folder: Path
    began_ns: list[int] = field(default_factory=list)
    ended_ns: list[int] = field(default_factory=list)
    statuses: list[list[Status]] = field(default_factory=list)
    received_ns: dict[tuple[int, int], int] = field(default_factory=dict)  # by (round, device): block at the node

    def count(self, status: Status) -> int:
        return sum(row.count(status) for row in self.statuses)


def record_rounds(folder: Path, *, rounds: int = 12, devices: int = 3, seed: int = 0) -> Recorded:
    """Two policies of two prompts each; most blocks answered, some late or lost, some devices idle."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    names = [f"device-{n}" for n in range(devices)]
    facts = {"config": {}, "policies": POLICIES, "devices": names, "links": "loopback", "emulated": {names[0]: {}}}
    write_manifest(folder, facts)
    done, now_ns = Recorded(folder), 7_000_000_000_123
    with Recorder(folder, folder.name, names, top_k=2, experts=0) as recorder:
        for number in range(rounds):
            policy, prompt = number * 2 // rounds, number * 4 // rounds % 2
            columns, now_ns = _round(done, rng, number, devices, now_ns)
            keys = {"round": number, "policy": policy, "prompt": prompt, "layer": number % 4, "phase": number % 2}
            shape = (2, 2)
            tokens = {name: np.zeros(shape) for name in ("expert", "weight", "asked", "kept", "device", "final_weight")}
            recorder.record_round({**keys, "attempt": 0, **columns}, {**tokens, "orphaned": np.zeros(2, bool)})
    _write_events(folder, done)
    return done


def _round(
    done: Recorded, rng: np.random.Generator, number: int, devices: int, began_ns: int
) -> tuple[dict[str, Any], int]:
    """The columns of one round that began then, and when the next one begins."""
    select, group, unlogged, quantise, combine = rng.integers(1_000, 90_000, 5).tolist()
    at_ns = began_ns + select + group + unlogged + quantise
    columns: dict[str, Any] = {name: np.full(devices, -1) for name in OF_A_BLOCK}
    columns |= {name: np.zeros(devices, np.int64) for name in COUNTS} | {"clock_offset_s": np.full(devices, np.nan)}
    statuses = [Status.ANSWERED if i == 0 else Status(rng.choice([0, 1, 1, 1, 2, 3])) for i in range(devices)]
    last_ns = at_ns
    for device, status in enumerate(statuses):
        columns["status"][device] = status
        if status is Status.IDLE:
            continue
        columns["bs_sent_ns"][device], columns["send_ns"][device] = at_ns, 5_000
        columns["rows"][device], columns["bytes_down"][device] = 3 + device, 4_096
        if status is Status.ANSWERED:
            last_ns = max(last_ns, _answer(columns, rng, device, at_ns))
            done.received_ns[number, device] = int(columns["node_received_ns"][device] - OFFSET_NS * (1 + device))
        at_ns += 6_000
    ended_ns = max(last_ns, at_ns) + combine + 3_000
    wait_ns = ended_ns - at_ns - combine - 3_000
    lengths = {
        "select_ns": select,
        "group_ns": group,
        "quantise_ns": quantise,
        "wait_ns": wait_ns,
        "dequantise_ns": 2_000,
    }
    done.began_ns.append(began_ns)
    done.ended_ns.append(ended_ns)
    done.statuses.append(statuses)
    columns |= lengths | {"combine_ns": combine, "round_ns": ended_ns - began_ns}
    columns |= {"dilation": 10.0, "node_boot": 1, "state_available": True}
    return columns, ended_ns + int(rng.integers(500, 400_000))


OFFSET_NS = 3_600_000_000_000
TIMES = ("node_dequantise_ns", "node_queue_ns", "node_compute_ns", "node_quantise_ns")
STAMPS = ("bs_sent_ns", "node_received_ns", "node_sent_ns", "bs_received_ns")
OF_A_BLOCK = (*STAMPS, *TIMES, "send_ns", "node_padding_ns", "rtt_ns", "down_ns", "up_ns", "clock_bound_ns")
COUNTS = ("rows", "experts_touched", "bytes_down", "bytes_up", "parts_down", "parts_up", "status")


def _answer(columns: dict[str, Any], rng: np.random.Generator, device: int, sent_ns: int) -> int:
    """The way of a block that was sent then; returns when its reply was there."""
    down, *lengths, up = rng.integers(60_000, 900_000, 6).tolist()
    offset_ns = OFFSET_NS * (1 + device)
    received_ns = sent_ns + down
    replied_ns = received_ns + sum(lengths) + 700
    stamps = (sent_ns, received_ns + offset_ns, replied_ns + offset_ns, replied_ns + up)
    for name, value in zip((*STAMPS, *TIMES), (*stamps, *lengths), strict=True):
        columns[name][device] = value
    columns["node_padding_ns"][device] = lengths[2] // 2 if device == 0 else 0
    error_ns = int(rng.integers(-BOUND_NS, BOUND_NS))
    columns["clock_offset_s"][device] = (offset_ns + error_ns) / 1e9
    columns["down_ns"][device], columns["up_ns"][device] = down - error_ns, up + error_ns
    columns["clock_bound_ns"][device] = BOUND_NS
    columns["rtt_ns"][device], columns["bytes_up"][device] = replied_ns + up - sent_ns, 2_048
    return replied_ns + up


def _write_events(folder: Path, done: Recorded) -> None:
    first_ns, last_ns = done.began_ns[0], done.ended_ns[-1]
    events = [
        {"monotonic_ns": first_ns - 5_000_000, "kind": "node_joined", "device": "device-0", "boot_id": 4},
        {"monotonic_ns": done.ended_ns[2], "kind": "node_lost", "device": "device-1", "how": "silent"},
        {"monotonic_ns": last_ns, "kind": "power", "device": "device-2", "power_w": 7.5, "sampled_ns": last_ns - 9_000},
        {"monotonic_ns": last_ns + 1, "kind": "scored", "policy": 1, "prompt": 1, "nats": 3.5},
    ]
    lines = [json.dumps({"realtime_ns": 1, **event}) for event in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
