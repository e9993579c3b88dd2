"""What runs have shown: how often each expert is used, and how quick each node is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from testbed.errors import ConfigError
from testbed.runlog.reader import read_manifest, read_table
from testbed.runlog.schema import Status

PROBE_NAME = "probe.json"
TOPK = 0  # every run's first policy leaves the gate's choice as it is


def expert_usage(run_dir: Path, experts_per_layer: Sequence[int]) -> tuple[list[NDArray[np.float64]], int]:
    """(for each layer the rows of a token that each expert got, tokens counted over all layers), as the gate chose.

    An expert that was never chosen counts as chosen once. Raises ConfigError for a run of another model, RunLogError
    for a folder that is no run.
    """
    table = read_table(run_dir, "tokens")
    layer_T = table["layer"].to_numpy()
    expert_TK = np.stack(table["expert"].combine_chunks().to_numpy(zero_copy_only=False)).astype(np.int64)
    if (first := np.equal(table["policy"].to_numpy(), TOPK)).any():
        layer_T, expert_TK = layer_T[first], expert_TK[first]
    layers = len(experts_per_layer)
    if int(layer_T.max()) >= layers or read_manifest(run_dir).get("layers", layers) != layers:
        raise ConfigError(f"{run_dir}: a run of a model with other layers than the {layers} of this one; name another")
    usage = []
    for layer, experts in enumerate(experts_per_layer):
        chosen = expert_TK[layer_T == layer]
        if not len(chosen):
            raise ConfigError(f"{run_dir}: no token of layer {layer} in this run; name a longer run")
        if (most := int(chosen.max())) >= experts:
            raise ConfigError(
                f"{run_dir}: expert {most} of layer {layer} was used; this model has {experts}: not its run"
            )
        counts = np.maximum(np.bincount(chosen.ravel(), minlength=experts), 1)
        usage.append(counts / len(chosen))
    return usage, len(layer_T)


def node_speeds(source: Path, names: Sequence[str]) -> dict[str, float]:
    """Rows per second of each node, link and compute together: from a probe's folder or file, or from a run.

    Raises ConfigError where a node was not measured.
    """
    probe = source if source.is_file() else source / PROBE_NAME
    speeds = _probed(probe) if probe.is_file() else _of_run(source)
    if missing := [name for name in names if name not in speeds]:
        known = ", ".join(sorted(speeds)) or "no device"
        raise ConfigError(f"{source}: {missing[0]} was not measured there, only {known}; name another run or probe")
    return {name: speeds[name] for name in names}


def _probed(path: Path) -> dict[str, float]:
    try:
        devices = json.loads(path.read_bytes())["devices"]
        seconds = {str(device["device"]): float(device["prefill_s"]) for device in devices}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not the probe.json of `testbed probe`; name one, or the folder of a run") from error
    return {name: 1 / taken_s for name, taken_s in seconds.items() if taken_s > 0}


def _of_run(run_dir: Path) -> dict[str, float]:
    names = read_manifest(run_dir).get("devices", [])
    table = read_table(run_dir, "rounds")
    columns = {name: table[name].to_numpy() for name in ("device", "rows", "status", "rtt_ns", "dilation")}
    used = np.equal(columns["status"], Status.ANSWERED) & (columns["rows"] > 0) & np.greater(columns["rtt_ns"], 0)
    seconds = columns["rtt_ns"] / columns["dilation"] * 1e-9
    speeds = {}
    for index, name in enumerate(names):
        of_device = used & np.equal(columns["device"], index)
        if of_device.any():
            speeds[str(name)] = float(columns["rows"][of_device].sum() / seconds[of_device].sum())
    return speeds
