"""The base station of a run: the model without its experts, its tokenizer, and the station of its nodes."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bs_node.band import Band, BandPlan
from bs_node.learning import Estimates
from bs_node.model import load_bs_model, load_tokenizer
from bs_node.probing import Prober
from bs_node.registry import Node, Registry
from bs_node.remote_experts import IMPLEMENTATION, attach
from bs_node.session import Session
from bs_node.station import Station
from bs_node.wireless import WirelessDispatcher, WireSettings
from testbed.checkpoint.manifest import Manifest
from testbed.collector import keep_what_is_loaded
from testbed.config import RunConfig
from testbed.experiment.emulation import Emulation, row_bytes
from testbed.policies.base import Policy
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase
from testbed.wire.sockets import StationSocket


class BaseStation:
    """Owns the socket, so it must be used by the thread that makes it."""

    def __init__(
        self,
        config: RunConfig,
        split_dir: Path,
        manifest: Manifest,
        sockets: StationSocket,
        recorder: Recorder,
        policies: Sequence[Policy],
        *,
        enrolled: dict[str, str] | None,
        emulation: Emulation,
        estimates: Estimates,
        band: Band | None = None,
    ) -> None:
        """`policies` are those of the run file, in its order; the first one is in force.

        `emulation` is told of each prompt and phase, and answers with the dilation.
        """
        torch.set_num_threads(1)  # the nodes need the other cores
        torch.manual_seed(config.seed)
        timeouts, wire = config.timeouts, config.wire
        self._config, self._manifest, self._policies = config, manifest, policies
        self.recorder, self._emulation = recorder, emulation
        self.run_number = secrets.randbits(62)  # by which nodes' own rows are known
        self._registry = Registry(manifest, int(timeouts.silence_s * 1e9))
        self._station = Station(
            sockets,
            self._registry,
            run=self.run_number,
            enrolled=enrolled,
            heartbeat_ns=int(timeouts.heartbeat_s * 1e9),
            window_bytes=wire.window_bytes,
            on_event=recorder.event,
        )
        padded_width = config.emulation.as_if_width or 0
        settings = WireSettings(wire.down, wire.up, wire.part_bytes, wire.window_bytes, padded_width, timeouts.reply_s)
        self.session = Session(
            policies[0],
            WirelessDispatcher(self._station, settings),
            estimates,
            self._registry.nodes,
            recorder=recorder,
            keep_scores=config.log.scores != "none",
            fail_on_orphans=config.on_loss.orphaned == "fail",
            probe_after_s=config.estimator.probe_after_s if config.estimator.estimates == "online" else None,
            band=band,
        )
        model = config.model
        self.model = load_bs_model(
            *(split_dir, manifest, model.dtype, IMPLEMENTATION, model.device), trusted=model.trust_remote_code
        )
        attach(self.model, manifest, self.session)
        self.model.register_forward_pre_hook(self._note_phase, with_kwargs=True)
        keep_what_is_loaded()
        self.tokenizer = load_tokenizer(split_dir, manifest)
        self.use_policy(0)

    def token_ids(self, text: str) -> list[int]:
        """Of a text as it is: nothing is put before it or behind."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _note_phase(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One new token per sequence is decoding, more are prefill."""
        tokens = kwargs.get("input_ids")
        if tokens is None:
            tokens = args[0] if args else kwargs["inputs_embeds"]  # embedded elsewhere: one more axis
        phase = GenerationPhase.DECODE if tokens.shape[1] == 1 else GenerationPhase.PREFILL
        if phase is not self.session.phase:
            self.session.phase, self.session.dispatcher.dilation = phase, self._emulation.enter(phase)

    def wait_for_nodes(self, still_possible: Callable[[], None]) -> None:
        """Until every node has joined; see Station.wait_for_all."""
        started_s = time.monotonic()
        self._station.wait_for_all(self._config.timeouts.join_s, still_possible)
        self.recorder.event("all_joined", after_s=time.monotonic() - started_s)

    def shape(self, device: int, bits_per_s: float) -> bool:
        """Ask a node to keep its uplink to this rate; False where it could not be told."""
        return self._station.shape(self._registry.nodes[device], bits_per_s)

    @property
    def nodes(self) -> list[Node]:
        return self._registry.nodes

    @property
    def row_bytes(self) -> tuple[int, int]:
        """What a row weighs on the wire, down and up."""
        return row_bytes(self._config, self._manifest)

    @property
    def top_k(self) -> int:
        return self._manifest.layers[0].top_k

    def prober(self) -> Prober:
        """Sends blocks to be measured to the experts of the first layer."""
        layer = self._manifest.layers[0]
        return Prober(self.session.dispatcher, layer.index, self._manifest.holds_NE(layer.index), layer.spec.width)

    def begin(self, policy: int, prompt: int) -> None:
        """Let channel and nodes become those of this prompt, and of its prefill."""
        self.session.begin_prompt(prompt, self._emulation.begin_prompt(policy, prompt))

    def emulated(self) -> dict[str, Any]:
        """What the nodes said of themselves when they joined."""
        return {node.name: node.emulated for node in self._registry.nodes if node.emulated}

    def computes(self) -> dict[str, Any]:
        """On what base station and nodes compute, and in which weights: what "auto" became."""
        where = self.model.device
        gpu = f" ({torch.cuda.get_device_name(where)})" if where.type == "cuda" else ""
        station = f"torch {where.type} {self._config.model.dtype}{gpu}"
        return {"base_station": station, "nodes": {node.name: node.computes for node in self._registry.nodes}}

    def use_policy(self, index: int) -> None:
        """Let this policy of the run file choose from now on."""
        spec = self._config.policies[index]
        session = self.session
        session.policy, session.policy_index = self._policies[index], index
        session.plan = BandPlan(spec.bandwidth, spec.period)

    def idle(self) -> None:
        """Between two rounds: hear the nodes, answer their heartbeats, notice who came or went. Does not wait."""
        self.session.dispatcher.refresh()

    def say_goodbye(self) -> None:
        self._station.say_goodbye(self._config.timeouts.drain_s)
