"""What surrounds an emulated run: the channel, the links, the pace of the nodes. The base station sees none of it.

A prompt is the unit of time: before each one the channel is drawn, links and nodes are set, and what a run with known
latencies may know is told. Everything is stretched by a dilation, decoding by one of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

import numpy as np

from jetson_node.pacing import write_factor
from testbed.channel.link_emulator import LinkEmulator
from testbed.channel.namespaces import NamespaceLinks
from testbed.channel.radio import Channel, Links, RadioChannel, placements
from testbed.channel.trace import TraceChannel
from testbed.checkpoint.manifest import Manifest
from testbed.config import DeviceSection, RunConfig
from testbed.experiment.truth import RECORD
from testbed.latency.csi import EstimatedCsi, ReportedCsi
from testbed.latency.known import KnownLatencies
from testbed.latency.model import ComputeModel, expert_flop_per_row
from testbed.policies.base import FloatArray
from testbed.runlog.schema import GenerationPhase
from testbed.wire.quantization import SCHEMES

NOTHING = ComputeModel(0.0, 0.0, 0.0)


class Emulation:
    """Use as a context manager. `on_event(kind, **facts)` hears of every prompt's channel."""

    def __init__(
        self, config: RunConfig, manifest: Manifest, run_dir: Path, pace_dir: Path, on_event: Callable[..., None]
    ) -> None:
        self._config, self._run_dir, self._on_event = config, run_dir, on_event
        self._stack = ExitStack()
        self._channel = make_channel(config)
        self._links: LinkEmulator | NamespaceLinks | None = None
        self._names = [device.name for device in config.devices]
        self.namespaces: dict[str, str] = {}
        self._prompt, self._rates = 0, Links(*np.full((2, len(self._names)), np.inf))  # in force, without dilation
        self._factor_N = np.ones(len(self._names))
        self._began_s: list[float] = []  # emulated time at which the first policy began each prompt
        self._passed_s = 0.0  # emulated time of the prompt under way until the moment in `_last` ...
        self._last = (monotonic(), 1.0)  # ... from which on time is stretched by that
        self.compute_N = [compute_model(config, manifest, device) for device in config.devices]
        self.pace_files = {device.name: pace_dir / f"{device.name}.pace" for device in config.devices}
        self.row_bytes_down, self.row_bytes_up = row_bytes(config, manifest)
        bits = 8 * self.row_bytes_down, 8 * self.row_bytes_up
        self._start, self._truth = (KnownLatencies(len(config.devices), *bits) for _ in range(2))
        self.csi = make_csi(config, bits)

    def __enter__(self) -> Emulation:
        for file in self.pace_files.values():
            write_factor(file, 1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def known(self) -> KnownLatencies:
        """What a run with `estimates = "static"` or `"oracle"` is told."""
        return self._truth if self._config.estimator.estimates == "oracle" else self._start

    @property
    def emulates(self) -> bool:
        return self._channel is not None or any(model != NOTHING for model in self.compute_N)

    def listen_host(self) -> str:
        """Where the base station must listen. Links in the kernel are laid here: they end at an address of theirs."""
        if self._config.radio is None or self._config.emulation.links != "namespaces":
            return self._config.listen.host
        links = self._stack.enter_context(NamespaceLinks(self._names, self._config.radio.medium))
        self._links, self.namespaces = links, links.namespaces
        return links.station_host

    def start_relay(self, host: str, port: int) -> dict[str, int]:
        """Device -> port to connect to: the relay's where there is one, else the base station's own."""
        if self._config.radio is None or self._links is not None:
            return dict.fromkeys(self._names, port)
        record = self._run_dir / RECORD
        relay = LinkEmulator(self._names, (host, port), self._config.radio.medium, record=record)
        self._links = self._stack.enter_context(relay)
        return dict(relay.ports)

    def begin_prompt(self, policy: int, prompt: int) -> float:
        """Draw the channel, set links and nodes for its prefill. Returns the dilation in force from now on."""
        self._prompt = prompt
        self._factor_N = np.array([self._throttle(device.name, prompt) for device in self._config.devices])
        self._stretch(GenerationPhase.PREFILL)
        facts: dict[str, list[float]] = {}
        if self._channel is not None:
            links = self._channel.links(prompt, self._time_s(prompt))
            self._set_links(links)
            self._tell(links, self._factor_N)
            self._report(prompt)
            facts = {name.removesuffix("_N"): rate_N.tolist() for name, rate_N in links._asdict().items()}
            facts["token_s"] = self._truth.token_s_N.tolist()
        if self.emulates:
            self._on_event("channel", policy=policy, prompt=prompt, factor=self._factor_N.tolist(), **facts)
        return self._dilation

    def enter(self, phase: GenerationPhase) -> float:
        """The prompt goes over to prefill, or to decoding. Returns the dilation in force from now on."""
        self._stretch(phase)
        self._set_links(self._rates)
        return self._dilation

    def _stretch(self, phase: GenerationPhase) -> None:
        """Let time, and the nodes, go at the dilation of this phase."""
        now_s, (since_s, before) = monotonic(), self._last
        self._passed_s += (now_s - since_s) / before
        emulation = self._config.emulation
        stretched = emulation.decode_dilation if phase is GenerationPhase.DECODE else emulation.dilation
        self._last = now_s, stretched if self.emulates else 1.0
        for file, factor in zip(self.pace_files.values(), self._factor_N, strict=True):
            write_factor(file, factor * self._dilation)

    @property
    def _dilation(self) -> float:
        return self._last[1]

    def _throttle(self, device: str, prompt: int) -> float:
        return float(np.prod([t.factor_at(prompt) for t in self._config.throttles if t.device == device]))

    def _time_s(self, prompt: int) -> float:
        """Emulated time at which the prompt begins: as it was under the first policy that got there."""
        passed_s, self._passed_s = self._passed_s, 0.0
        if prompt == len(self._began_s):
            self._began_s.append(self._began_s[-1] + passed_s if self._began_s else 0.0)
        return self._began_s[prompt]

    def share_band(self, share_N: FloatArray) -> None:
        """Give device n share_N[n] of the band from now on: the links take the rates that the true channel then has."""
        if isinstance(self._channel, RadioChannel):
            self._set_links(self._channel.shared_links(self._prompt, share_N))

    def _set_links(self, links: Links) -> None:
        self._rates = links
        if self._links is not None and self._config.radio is not None:
            down, up = links.down_bits_per_s_N / self._dilation, links.up_bits_per_s_N / self._dilation
            delay_s = self._config.radio.delay_s * self._dilation
            self._links.set_links(self._prompt, down.tolist(), up.tolist(), delay_s)

    def _report(self, prompt: int) -> None:
        if isinstance(self.csi, ReportedCsi) and isinstance(self._channel, RadioChannel):
            self.csi.report(self._channel.reported_snr_hz(prompt, self._config.csi.error_db))

    def _tell(self, links: Links, factor_N: FloatArray) -> None:
        delay_s = self._config.radio.delay_s if self._config.radio is not None else 0.0
        for told in (self._truth, self._start):
            if told is self._truth or np.isnan(self._start.token_s_N).all():
                told.tell(*links, delay_s, self.compute_N, factor_N, monotonic())


def make_channel(config: RunConfig) -> Channel | None:
    """The run file's channel; None where links are as they are. Raises ConfigError."""
    radio = config.radio
    if radio is None:
        return None
    if radio.trace is not None:
        return TraceChannel(radio.trace, [device.name for device in config.devices], radio)
    distance_m_N = np.array([device.distance_m or np.nan for device in config.devices])
    if radio.placement is not None:
        distance_m_N = placements(radio.placement, len(config.devices))
    return RadioChannel(radio, distance_m_N, config.seed)


def make_csi(config: RunConfig, row_bits: tuple[int, int]) -> EstimatedCsi | ReportedCsi | None:
    """What the base station will know of the links; None where the band cannot be shared out."""
    radio, devices = config.radio, len(config.devices)
    if radio is None or radio.trace is not None or radio.medium == "shared":
        return None
    if config.csi.source == "reported":
        return ReportedCsi(radio.bandwidth_hz, devices, *row_bits)
    return EstimatedCsi(radio.bandwidth_hz, devices, *row_bits)


def row_bytes(config: RunConfig, manifest: Manifest) -> tuple[int, int]:
    """What a row weighs on the wire, down and up."""
    width = max(manifest.layers[0].spec.width, config.emulation.as_if_width or 0)
    return SCHEMES[config.wire.down].row_bytes(width), SCHEMES[config.wire.up].row_bytes(width)


def compute_model(config: RunConfig, manifest: Manifest, device: DeviceSection) -> ComputeModel:
    """What the device's compute is padded to, before dilation; all zero where it is as fast as it is."""
    if device.emulated_flops_per_s is None:
        return NOTHING
    emulation, spec = config.emulation, manifest.layers[0].spec
    width, inner = emulation.as_if_width or spec.width, emulation.as_if_inner or spec.inner
    flop_per_row = expert_flop_per_row(width, inner, spec.has_gate)
    if emulation.compute == "paper" or device.emulated_memory_bytes_per_s is None:
        return ComputeModel.paper(flop_per_row, device.emulated_flops_per_s)
    values = (3 if spec.has_gate else 2) * width * inner
    return ComputeModel.roofline(
        flop_per_row,
        device.emulated_flops_per_s,
        values * emulation.weight_bytes_per_value,
        device.emulated_memory_bytes_per_s,
        device.emulated_base_s,
    )
