"""Emulated time out of real time: what a round would have taken, and how much of it was this machine's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from testbed.experiment.truth import link_truth
from testbed.latency.model import ComputeModel, eq8_prompt_s, rate_bits_per_s
from testbed.policies.bandwidth import spectral_snr_hz
from testbed.runlog.schema import GenerationPhase

EMULATED_ROUND, PATH = "emulated_round_ns", "emulated_path_ns"
OVERRUN_ABOVE = 0.1  # share of a round's emulated time that may be real overhead
OVERRUNS_ALLOWED = 0.01  # share of rounds that may be above it

Floats = NDArray[np.float64]


def with_emulated_times(
    run_dir: Path, rounds: pa.Table, manifest: Mapping[str, Any], events: Sequence[Mapping[str, Any]]
) -> pa.Table:
    """Adds the round's time without dilation, and what channel and device alone asked for in each row (real ns)."""
    if "dilation" not in rounds.column_names:  # the first runs emulated nothing
        rounds = rounds.append_column("dilation", pa.array(np.ones(rounds.num_rows)))
    dilation = rounds["dilation"].to_numpy()
    path_ns = emulated_compute_s(rounds, manifest, events) * dilation * 1e9
    radio = manifest["config"].get("radio") or {}
    truth = link_truth(run_dir, rounds, shared=radio.get("medium", "fdd") != "fdd")
    if truth is not None:
        delay_s = radio.get("delay_s", 0.0) * (rounds["rows"].to_numpy() > 0)
        path_ns += truth.down_air_ns + truth.up_air_ns + 2e9 * delay_s * dilation
    elif radio:  # the kernel keeps no record: what its rates ask for
        path_ns += air_seconds(rounds, manifest, events).sum(axis=1) * dilation * 1e9
    rounds = rounds.append_column(EMULATED_ROUND, pa.array(rounds["round_ns"].to_numpy() / dilation))
    return rounds.append_column(PATH, pa.array(np.nan_to_num(path_ns)))


def emulated_compute_s(rounds: pa.Table, manifest: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Floats:
    """What each row's device was to compute for: its model times the prompt's factor. 0 where it plays no other."""
    device, rows, experts = (rounds[name].to_numpy() for name in ("device", "rows", "experts_touched"))
    seconds: Floats = np.zeros(rounds.num_rows)
    for index, name in enumerate(manifest["devices"]):
        if name in manifest["emulated"]:
            mine = device == index
            seconds[mine] = ComputeModel(**manifest["emulated"][name]).seconds(rows[mine], experts[mine])
    policy, prompt = rounds["policy"].to_numpy(), rounds["prompt"].to_numpy()
    factor = np.ones(rounds.num_rows)
    for event in events:
        if event["kind"] == "channel":
            mine = (policy == event["policy"]) & (prompt == event["prompt"])
            factor[mine] = np.array(event["factor"])[device[mine]]
    return seconds * factor


def air_seconds(rounds: pa.Table, manifest: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Floats:
    """What the bytes of every row of `rounds` take at the rates of its prompt's channel: down, up.

    Where a device was given another part of the band than the even one, it has the rate of that (Eq. 2, 3).
    """
    device, policy, prompt = (rounds[name].to_numpy() for name in ("device", "policy", "prompt"))
    rate_R2 = np.full((rounds.num_rows, 2), np.inf)
    for event in events:
        if event["kind"] == "channel":
            mine = (policy == event["policy"]) & (prompt == event["prompt"])
            rate_2N = np.array([event["down_bits_per_s"], event["up_bits_per_s"]])
            rate_R2[mine] = rate_2N[:, device[mine]].T
    if "bandwidth_hz" not in rounds.column_names:  # runs before that shared it evenly
        return _bits_R2(rounds) / rate_R2
    band_hz_R1 = rounds["bandwidth_hz"].to_numpy()[:, None].astype(float)
    even_hz = manifest["config"]["radio"].get("bandwidth_hz", np.nan) / len(manifest["devices"])
    snr_hz_R2 = spectral_snr_hz(rate_R2, 1.0, even_hz)
    given_R2 = np.broadcast_to(band_hz_R1 > 0, rate_R2.shape)
    rate_R2 = np.where(given_R2, rate_bits_per_s(band_hz_R1, snr_hz_R2, 1.0, 1.0), rate_R2)
    return _bits_R2(rounds) / rate_R2


def _bits_R2(rounds: pa.Table) -> Floats:
    return np.column_stack([8.0 * rounds[name].to_numpy() for name in ("bytes_down", "bytes_up")])


def overhead_of_rounds(rounds: pa.Table) -> Floats:
    """Per round: (its time - the slowest device's emulated time) / that. Rounds in which nothing is emulated are left
    out, and so are those that lost a reply: they wait for a deadline."""
    grouped = rounds.group_by("round", use_threads=False).aggregate(
        [(PATH, "max"), ("round_ns", "max"), ("status", "max")]
    )
    path_ns, round_ns = grouped[f"{PATH}_max"].to_numpy(), grouped["round_ns_max"].to_numpy()
    counts = (path_ns > 0) & (grouped["status_max"].to_numpy() <= 1)
    overhead: Floats = (round_ns[counts] - path_ns[counts]) / path_ns[counts]
    return overhead


def eq8_sum_s(tokens: pa.Table, events: list[dict[str, Any]]) -> float:
    """Eq. 8 of the prefill with the true channel of every prompt, summed; NaN where no channel was emulated."""
    prefill = tokens.filter(pc.equal(tokens["phase"], int(GenerationPhase.PREFILL)))
    total_s = 0.0
    channels = {event["prompt"]: event for event in events if event["kind"] == "channel" and "token_s" in event}
    for prompt, event in channels.items():
        mine = prefill.filter(pc.equal(prefill["prompt"], prompt))
        if mine.num_rows:
            device_TK = np.stack(mine["device"].to_numpy(zero_copy_only=False)).astype(np.int64)
            total_s += eq8_prompt_s(np.array(event["token_s"]), device_TK)
    return total_s if channels else float("nan")
