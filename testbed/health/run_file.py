"""Checks of what a run file asks of this machine. The run file itself has been read and is valid."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
from collections.abc import Callable

import psutil

from testbed.channel.kernel import missing
from testbed.config import PolicySpec, RunConfig
from testbed.health.machine import Level, Verdict
from testbed.policies.loading import label, make_policy

GIB = 2**30
# Resident sizes: torch and transformers take 0.33 GiB; a node shares torch's pages with its fork server.
STATION_GIB, NODE_GIB = 1.0, 0.15
OTHER_FILES, FILES_PER_DEVICE = 64, 16


def model(config: RunConfig) -> Verdict:
    folder = config.model.folder
    if not folder.is_dir():
        remedy = "python -m testbed.demo.train makes it" if config.model.path == "demo" else "set model.path"
        return "problem", f"{folder}: no such folder; {remedy}"
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type", "unknown type")
    except (OSError, ValueError, AttributeError):
        return "problem", f"{folder}: has no readable config.json; set model.path to a Hugging Face checkpoint"
    if not any(folder.glob("*.safetensors")):
        return "problem", f"{folder}: has no *.safetensors file; save the checkpoint in that format"
    return "ok", f"{folder}: {kind}"


def policies(config: RunConfig) -> Verdict:
    return "ok", ", ".join(_label(spec) for spec in config.policies)


def listen(config: RunConfig) -> Verdict:
    host, port = config.listen.host, config.listen.port
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as ZeroMQ does
        try:
            probe.bind((host, port))
        except OSError as error:
            return "problem", f"{host}:{port}: {error.strerror}; set listen.port = 0 for a free port, or another host"
    return "ok", f"{host}:{port or 'any free port'}"


def disk(config: RunConfig) -> Verdict:
    folder = config.log.directory.absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return "problem", f"{there}: nothing can be written there; set log.directory to a folder of yours"
    free_gib = shutil.disk_usage(there).free / GIB
    level: Level = "problem" if free_gib < 0.1 else "warning" if free_gib < 1 else "ok"
    return level, f"{there}: {free_gib:.1f} GiB free" + "; make room or set log.directory" * (level != "ok")


def memory(config: RunConfig) -> Verdict:
    free_gib = psutil.virtual_memory().available / GIB
    model_gib = sum(file.stat().st_size for file in config.model.folder.glob("*.safetensors")) / GIB
    needed_gib = STATION_GIB + 2 * model_gib + NODE_GIB * len(config.devices)
    figures = f"{free_gib:.1f} GiB free, about {needed_gib:.1f} GiB needed"
    if free_gib < needed_gib:
        return "warning", f"{figures}; end other programs or take fewer devices"
    return "ok", figures


def cores(config: RunConfig) -> Verdict:
    available = len(os.sched_getaffinity(0))
    threads = 1 + sum(device.threads for device in config.devices)
    if threads > available:
        return (
            "warning",
            f"{available} for {threads} threads: nodes on this machine wait for each other, times include it",
        )
    return "ok", f"{available} for {threads} threads"


def open_files(config: RunConfig) -> Verdict:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OTHER_FILES + FILES_PER_DEVICE * len(config.devices)
    if limit != resource.RLIM_INFINITY and limit < needed:
        return "problem", f"at most {limit}, about {needed} needed; ulimit -n {needed}"
    return "ok", f"at most {limit}, about {needed} needed"


def links(config: RunConfig) -> Verdict:
    if config.radio is None:
        return "ok", "as they are"
    if config.emulation.links == "relay":
        return "ok", "emulated by a TCP relay"
    reason = missing()
    return ("ok", "emulated by the kernel") if reason is None else ("problem", reason)


RUN_CHECKS: dict[str, Callable[[RunConfig], Verdict]] = {
    "model": model,
    "policies": policies,
    "listen": listen,
    "links": links,
    "log folder": disk,
    "memory": memory,
    "cores": cores,
    "open files": open_files,
}


def _label(spec: PolicySpec) -> str:
    return label(spec.name, make_policy(spec.name, spec.params).params, spec.bandwidth, spec.period)
