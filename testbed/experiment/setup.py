"""A testbed that stands: model split, keys made, links and nodes started, base station loaded, everyone joined.

split -> run folder -> keys -> socket -> links -> nodes start -> the base station's part loads -> join -> probe
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import zmq

from bs_node.band import Band
from testbed.checkpoint.manifest import Manifest, manifest_hash
from testbed.config import RunConfig
from testbed.experiment.emulation import NOTHING, Emulation, make_channel
from testbed.experiment.model_split import split_model
from testbed.experiment.shaped_links import ShapedLinks
from testbed.fleet.local import LocalFleet, prepare_fork_server
from testbed.latency.estimator import Estimator
from testbed.latency.known import KnownLatencies
from testbed.paths import runtime_directory
from testbed.policies.base import Policy
from testbed.policies.loading import label
from testbed.runlog.collect import collect_what_is_there
from testbed.runlog.manifest import environment, new_run_directory, write_config, write_manifest
from testbed.runlog.reader import read_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import NODES
from testbed.wire.keys import enrolled_nodes, make_run_keys, read_pair
from testbed.wire.sockets import AllowList, StationSocket

if TYPE_CHECKING:
    from testbed.experiment.base_station import BaseStation


@contextmanager
def standing_testbed(
    config: RunConfig, policies: list[Policy], *, config_path: Path, out: Path | None, insecure: bool
) -> Iterator[tuple[BaseStation, Path]]:
    """The base station with all its nodes, and the run's folder. Everything started is stopped again, whatever happens.

    Raises WdmoeError for what a user can mend.
    """
    make_channel(config)  # what is wrong with a trace is told before anything is made
    if config.model.device == "cuda":
        from bs_node.model import compute_device  # torch is slow to load

        compute_device("cuda")
    split_dir, manifest = split_model(config)
    run_dir = new_run_directory(out or config.log.directory, config.name)
    write_config(run_dir, config_path.read_text())
    prepare_fork_server()
    with ExitStack() as stack:
        stack.callback(collect_what_is_there, run_dir)  # when nodes have ended and the log is sealed
        recorder = stack.enter_context(open_recorder(config, manifest, run_dir))
        pace = stack.enter_context(runtime_folder("pace"))
        emulation = stack.enter_context(Emulation(config, manifest, run_dir, pace, recorder.event))
        host = emulation.listen_host()
        shaped = None if config.shaping is None else stack.enter_context(ShapedLinks(config, config.shaping))
        keys = None if insecure else config.fleet.keys or run_keys(stack, list(manifest.devices))
        enrolled = None if keys is None else enrolled_nodes(keys / "bs")
        sockets = open_socket(host, config.listen.port, keys, enrolled)
        stack.callback(sockets.close)
        stations = {name: f"tcp://{host}:{port}" for name, port in emulation.start_relay(host, sockets.port).items()}
        local = config.fleet.start == "local"
        arguments = node_arguments(config, split_dir, stations, keys, emulation, run_dir / NODES) if local else {}
        fleet = stack.enter_context(LocalFleet(arguments, run_dir / NODES, recorder.event, emulation.namespaces))

        from testbed.experiment.base_station import BaseStation  # transformers loads while the nodes start

        base_station = BaseStation(
            config, split_dir, manifest, sockets, recorder, policies,
            enrolled=enrolled, emulation=emulation, estimates=make_estimates(config, emulation),
            band=make_band(config, emulation, shaped),
        )  # fmt: skip
        if shaped is not None:
            shaped.ask_node = base_station.shape
        stack.callback(base_station.say_goodbye)
        facts = describe(config, manifest, policies, insecure)
        facts["run_number"] = str(base_station.run_number)  # too large for a number of JavaScript
        write_manifest(run_dir, facts)
        base_station.wait_for_nodes(fleet.raise_if_dead)
        joined = {"emulated": base_station.emulated(), "computes": base_station.computes()}
        write_manifest(run_dir, {**facts, **joined})
        base_station.begin(0, 0)
        base_station.session.probe_at_join(base_station.prober())
        yield base_station, run_dir


def open_recorder(config: RunConfig, manifest: Manifest, run_dir: Path) -> Recorder:
    return Recorder(
        run_dir,
        run_dir.name,
        manifest.devices,
        top_k=max(layer.top_k for layer in manifest.layers),
        experts=0 if config.log.scores == "none" else max(layer.experts for layer in manifest.layers),
        score_dtype="float32" if config.log.scores == "float32" else "float16",
        segment_rows=config.log.segment_rows,
    )


def run_keys(stack: ExitStack, devices: list[str]) -> Path:
    """Keys of this run only."""
    folder = stack.enter_context(runtime_folder("keys"))
    make_run_keys(folder, devices)
    return folder


@contextmanager
def runtime_folder(kind: str) -> Iterator[Path]:
    """A folder in the private runtime directory, gone when the run is over."""
    for left in runtime_directory().glob(f"{kind}-*-*"):  # by a run that was killed
        if not psutil.pid_exists(int(left.name.split("-")[1])):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{kind}-{os.getpid()}-", dir=runtime_directory()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def make_estimates(config: RunConfig, emulation: Emulation) -> Estimator | KnownLatencies:
    """What policies are told: measurements, or the channel itself, at the start or at every prompt."""
    if config.estimator.estimates != "online":
        return emulation.known
    memory = config.estimator.memory_rounds
    return Estimator(len(config.devices), emulation.row_bytes_down, emulation.row_bytes_up, memory_rounds=memory)


def make_band(config: RunConfig, emulation: Emulation, shaped: ShapedLinks | None) -> Band | None:
    """What there is to share out: the band of a [radio], or the rate of [shaping]; None: nothing."""
    if shaped is not None:
        return Band(shaped.csi, len(config.devices), shaped.share_band)
    return None if emulation.csi is None else Band(emulation.csi, len(config.devices), emulation.share_band)


def open_socket(host: str, port: int, keys: Path | None, enrolled: dict[str, str] | None) -> StationSocket:
    if keys is None or enrolled is None:
        return StationSocket(host, port, None, None)
    return StationSocket(host, port, read_pair(keys / "bs", "bs"), AllowList(enrolled))


def node_arguments(
    config: RunConfig,
    split_dir: Path,
    stations: dict[str, str],
    keys: Path | None,
    emulation: Emulation,
    rows_dir: Path,
) -> dict[str, list[str]]:
    """The command line of every node: what one would type on a board. Its own rows go to a folder in `rows_dir`."""
    arguments = {}
    for device, model in zip(config.devices, emulation.compute_N, strict=True):
        argv = ["--name", device.name, "--station", stations[device.name], "--shards", str(split_dir)]
        argv += ["--insecure"] if keys is None else ["--keys", str(keys / device.name)]
        argv += ["--backend", device.backend, "--threads", str(device.threads), "--dtype", config.model.dtype]
        argv += ["--rows", str(rows_dir.resolve() / device.name)]
        argv += ["--part-bytes", str(config.wire.part_bytes), "--join-timeout-s", str(config.timeouts.join_s)]
        if model != NOTHING:
            argv += ["--emulated-row-s", repr(model.row_s), "--emulated-expert-s", repr(model.expert_s)]
            argv += ["--emulated-base-s", repr(model.base_s), "--pace-file", str(emulation.pace_files[device.name])]
        arguments[device.name] = [*argv, "--stop-with-parent"]
    return arguments


def labels(config: RunConfig, policies: Sequence[Policy]) -> list[str]:
    """What each policy of the run is called."""
    return [
        label(policy.name, policy.params, spec.bandwidth, spec.period)
        for spec, policy in zip(config.policies, policies, strict=True)
    ]


def describe(config: RunConfig, manifest: Manifest, policies: Sequence[Policy], insecure: bool) -> dict[str, Any]:
    """What one must know to understand the rows; what is emulated is known when the nodes have joined.

    On which text the testbed works is added by who brings it: `add_facts`.
    """
    return {
        "config": config.model_dump(mode="json", by_alias=True),
        "seed": config.seed,
        "policies": labels(config, policies),
        "policy_params": [dict(policy.params) for policy in policies],
        "devices": list(manifest.devices),
        "layers": len(manifest.layers),
        "model": {"name": manifest.model_name, "type": manifest.model_type, "hash": manifest.model_hash},
        "split_hash": manifest_hash(manifest),
        "links": links(config),
        "encryption": "none (--insecure)" if insecure else "CURVE (curve25519, xsalsa20poly1305) with an allow-list",
        "environment": environment(libzmq=zmq.zmq_version()),
    }


def add_facts(run_dir: Path, **facts: Any) -> None:
    """Complete the manifest of a run under way."""
    write_manifest(run_dir, {**read_manifest(run_dir), **facts})


def links(config: RunConfig) -> str:
    """What the run's links are, in words."""
    if config.radio is None:
        shaped = "" if config.shaping is None else f", rates shaped by tc to {config.shaping.bits_per_s:g} bit/s in all"
        return ("loopback, as they are" if config.fleet.start == "local" else "as they are") + shaped
    how = "a recorded trace" if config.radio.trace is not None else f"{config.radio.fading} fading"
    by = "a TCP relay" if config.emulation.links == "relay" else "the kernel (network namespaces, tc)"
    return f"emulated by {by}, {how}, {config.radio.medium}, times stretched"
