"""One run: split the model, start the nodes, join them, run every policy over the same text, log, sum up.

prepare -> start nodes -> load the base station's part -> join -> for each policy: score, generate -> seal -> results
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import zmq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from testbed.checkpoint.manifest import Manifest, manifest_hash
from testbed.config import RunConfig
from testbed.experiment.results import Results, summarise
from testbed.fleet.local import LocalFleet
from testbed.paths import cache_directory, runtime_directory
from testbed.policies.loading import label, make_policy
from testbed.runlog.manifest import environment, new_run_directory, write_config, write_manifest
from testbed.runlog.recorder import Recorder
from testbed.wire.keys import enrolled_nodes, make_run_keys, read_pair
from testbed.wire.sockets import AllowList, StationSocket


def run_experiment(
    config: RunConfig, *, config_path: Path, out: Path | None, insecure: bool, display: Console
) -> Results:
    """Run what the run file asks for and return the table's figures, read back from the log.

    Everything started is stopped again, whatever happens. Raises WdmoeError for what a user can mend.
    """
    policies = [make_policy(spec.name, spec.params) for spec in config.policies]
    split_dir, manifest = split_model(config)
    run_dir = new_run_directory(out or config.log.directory, config.name)
    write_config(run_dir, config_path.read_text())
    with ExitStack() as stack:
        recorder = stack.enter_context(
            Recorder(
                run_dir, run_dir.name, manifest.devices,
                top_k=max(layer.top_k for layer in manifest.layers),
                experts=0 if config.log.scores == "none" else max(layer.experts for layer in manifest.layers),
                score_dtype="float32" if config.log.scores == "float32" else "float16",
                segment_rows=config.log.segment_rows,
            )
        )  # fmt: skip
        keys = None if insecure else config.fleet.keys or stack.enter_context(run_keys(list(manifest.devices)))
        enrolled = None if keys is None else enrolled_nodes(keys / "bs")
        sockets = open_socket(config, keys, enrolled)
        stack.callback(sockets.close)
        arguments = node_arguments(config, split_dir, sockets.port, keys) if config.fleet.start == "local" else {}
        fleet = stack.enter_context(LocalFleet(arguments, run_dir / "nodes", recorder.event))

        from testbed.experiment.base_station import BaseStation  # transformers loads while the nodes start

        base_station = BaseStation(config, split_dir, manifest, sockets, recorder, policies[0], enrolled=enrolled)
        stack.callback(base_station.say_goodbye)
        facts = describe(config, manifest, base_station.workload.text_sha256, [label(p) for p in policies], insecure)
        write_manifest(run_dir, facts)
        base_station.wait_for_nodes(fleet.raise_if_dead)
        write_manifest(run_dir, {**facts, "emulated": base_station.emulated()})
        with progress_bar(display) as progress:
            for index, policy in enumerate(policies):
                base_station.run_policy(index, policy, label(policy), progress)
    return summarise(run_dir)


def split_model(config: RunConfig) -> tuple[Path, Manifest]:
    """The run's split checkpoint, made once and kept in the cache."""
    from testbed.checkpoint.split import split

    devices = [device.name for device in config.devices]
    placement = None if config.placement is None else {d: list(e) for d, e in config.placement.items()}
    source = config.model.folder.resolve()
    wanted = json.dumps([str(source), fingerprint(source), devices, placement], sort_keys=True)
    out_dir = cache_directory() / "splits" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    return out_dir, split(source, out_dir, devices, placement=placement)


def fingerprint(folder: Path) -> list[list[Any]]:
    """Changes when a file of the checkpoint does."""
    if not folder.is_dir():
        return []
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir()) if p.is_file()]


@contextmanager
def run_keys(devices: list[str]) -> Iterator[Path]:
    """Keys of this run only, in the private runtime directory, gone when the run is over."""
    for left in runtime_directory().glob("keys-*-*"):  # by a run that was killed
        if not psutil.pid_exists(int(left.name.split("-")[1])):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"keys-{os.getpid()}-", dir=runtime_directory()))
    try:
        make_run_keys(folder, devices)
        yield folder
    finally:
        shutil.rmtree(folder)


def open_socket(config: RunConfig, keys: Path | None, enrolled: dict[str, str] | None) -> StationSocket:
    if keys is None or enrolled is None:
        return StationSocket(config.listen.host, config.listen.port, None, None)
    return StationSocket(config.listen.host, config.listen.port, read_pair(keys / "bs", "bs"), AllowList(enrolled))


def node_arguments(config: RunConfig, split_dir: Path, port: int, keys: Path | None) -> dict[str, list[str]]:
    """The command line of every node: what one would type on a board."""
    arguments = {}
    for device in config.devices:
        argv = ["--name", device.name, "--station", f"tcp://{config.listen.host}:{port}", "--shards", str(split_dir)]
        argv += ["--insecure"] if keys is None else ["--keys", str(keys / device.name)]
        argv += ["--backend", device.backend, "--threads", str(device.threads), "--dtype", config.model.dtype]
        argv += ["--part-bytes", str(config.wire.part_bytes), "--join-timeout-s", str(config.timeouts.join_s)]
        if device.emulated_flops_per_s is not None:
            argv += ["--emulated-flops-per-s", repr(device.emulated_flops_per_s)]
        arguments[device.name] = [*argv, "--stop-with-parent"]
    return arguments


def describe(
    config: RunConfig, manifest: Manifest, text_sha256: str, policies: list[str], insecure: bool
) -> dict[str, Any]:
    """What one must know to understand the rows; what is emulated is known when the nodes have joined."""
    return {
        "config": config.model_dump(mode="json", by_alias=True),
        "seed": config.seed,
        "policies": policies,
        "devices": list(manifest.devices),
        "layers": len(manifest.layers),
        "model": {"name": manifest.model_name, "type": manifest.model_type, "hash": manifest.model_hash},
        "split_hash": manifest_hash(manifest),
        "text_sha256": text_sha256,
        "text": "held-out files of the running Python's standard library",
        "links": "loopback, as they are",
        "encryption": "none (--insecure)" if insecure else "CURVE (curve25519, xsalsa20poly1305) with an allow-list",
        "environment": environment(libzmq=zmq.zmq_version()),
    }


@contextmanager
def progress_bar(display: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Calls (policy, done, total) become a bar on a terminal; nothing is drawn elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=display, disable=not display.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def show(policy: str, done: int, total: int) -> None:
            if policy not in tasks:
                tasks[policy] = progress.add_task(policy, total=total)
            progress.update(tasks[policy], completed=done)

        yield show
