"""Small runs to report on, written by hand: two policies, two devices, two layers, every time known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase, Status

MS = 1_000_000  # ns
LAYERS, PROMPTS, TOKENS, TOP_K, EXPERTS = 2, 3, 4, 2, 4
PREFILL_MS = (8, 4)  # a block of each policy
SENT_NS = 1_000 * MS
NAMES = ("topk", "wlr θ=0.2")


def write_run(
    folder: Path,
    *,
    devices: Sequence[str] = ("near", "far"),
    policies: Sequence[str] = NAMES,
    lost: int = 0,
    prompts: int = PROMPTS,
    power_w: Sequence[float] = (),
    closed: bool = True,
    keep_open: ExitStack | None = None,
    **of_round: Any,
) -> Path:
    """Write a run under `folder` and return its own. The first `lost` rounds lose the second device.

    `prompts` of PROMPTS are done. Not `closed`, it is still recorded, until `keep_open` ends.
    """
    run_dir = folder / "20260102-030405-hand"
    run_dir.mkdir(parents=True)
    write_manifest(run_dir, _manifest(devices, policies))
    recorder = Recorder(run_dir, run_dir.name, devices, top_k=TOP_K, experts=EXPERTS, segment_rows=256)
    for device in devices:
        recorder.event("node_joined", device=device, boot_id=1, joins=1)
    for power in power_w:
        recorder.event("power", device=devices[0], power_w=power, sampled_ns=SENT_NS + int(power * 1000) * MS)
    number = 0
    for policy in range(len(policies)):
        for prompt in range(prompts):
            for phase in GenerationPhase:
                for layer in range(LAYERS):
                    is_lost = number < lost
                    recorder.record_round(
                        _round(number, policy, prompt, layer, phase, is_lost, of_round), _tokens(is_lost)
                    )
                    number += 1
            recorder.event("scored", policy=policy, prompt=prompt, tokens=4, nats=4 * math.log(3.0 + policy), correct=3)
    if closed:
        recorder.close()
    elif keep_open is not None:
        keep_open.callback(recorder.close)
    return run_dir


def _manifest(devices: Sequence[str], policies: Sequence[str]) -> dict[str, Any]:
    return {
        "config": {
            "policy": [{"name": "topk"}, {"name": "wlr", "theta": 0.2}],
            "on_loss": {"invalid_above": 0.01},
            "radio": None,
            "workload": {"score_prompts": PROMPTS, "generate_prompts": 0, "new_tokens": 0},
            "fleet": {"start": "none"},
            "timeouts": {"heartbeat_s": 0.5},
        },
        "policies": list(policies),
        "layers": LAYERS,
        "devices": list(devices),
        "model": {"name": "tiny", "type": "mixtral"},
        "emulated": {},
        "links": "as they are",
        "seed": 0,
    }


def _round(
    number: int, policy: int, prompt: int, layer: int, phase: GenerationPhase, is_lost: bool, more: dict[str, Any]
) -> dict[str, Any]:
    span_ns = PREFILL_MS[policy % 2] * MS // (1 + 3 * phase)
    sent = SENT_NS + number * 20 * MS
    status = np.array([Status.ANSWERED, Status.LATE if is_lost else Status.ANSWERED])
    received = np.array([sent + span_ns // 2, -1 if is_lost else sent + span_ns])
    way = np.where(received < 0, -1, span_ns // 8)
    return {
        "round": number, "policy": policy, "prompt": prompt, "layer": layer, "phase": int(phase), "attempt": 0,
        "node_boot": 1, "dilation": 1.0, "rows": 4, "experts_touched": 2, "bytes_down": 4096, "bytes_up": 4096,
        "parts_down": 1, "parts_up": 1, "status": status, "select_ns": MS // 10, "group_ns": MS // 10,
        "quantise_ns": MS // 10, "send_ns": MS // 20, "wait_ns": span_ns, "dequantise_ns": MS // 10,
        "combine_ns": MS // 10, "round_ns": span_ns + MS // 2, "rtt_ns": np.where(received < 0, -1, received - sent),
        "bs_sent_ns": sent, "bs_received_ns": received, "node_received_ns": 5, "node_sent_ns": 9,
        "node_queue_ns": MS // 50, "node_dequantise_ns": MS // 50, "node_compute_ns": span_ns // 8,
        "node_padding_ns": 0,
        "node_quantise_ns": MS // 50, "down_ns": way, "up_ns": way, "clock_bound_ns": np.where(way < 0, -1, MS // 10),
        "predicted_compute_s": 1e-3, "predicted_down_s": 1e-3, "predicted_up_s": 1e-3, "state_available": True, **more,
    }  # fmt: skip


def _tokens(is_lost: bool) -> dict[str, Any]:
    expert = np.tile([0, 1], (TOKENS, 1))
    expert[0] = [2, 3]
    kept = np.tile([True, not is_lost], (TOKENS, 1))
    return {
        "expert": expert, "asked": expert, "weight": np.full((TOKENS, TOP_K), 0.5), "kept": kept,
        "device": np.tile([0, 1], (TOKENS, 1)), "final_weight": np.where(kept, 0.5, 0), "orphaned": ~kept.any(axis=1),
    }  # fmt: skip
