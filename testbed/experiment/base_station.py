"""The base station of a run: the model without its experts, its station, and the work that a policy is measured on."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from bs_node.band import Band, BandPlan
from bs_node.learning import Estimates
from bs_node.model import load_bs_model
from bs_node.probing import Prober
from bs_node.registry import Node, Registry
from bs_node.remote_experts import IMPLEMENTATION, attach
from bs_node.session import Session
from bs_node.station import Station
from bs_node.wireless import WirelessDispatcher, WireSettings
from testbed.checkpoint.manifest import Manifest
from testbed.collector import keep_what_is_loaded
from testbed.config import RunConfig
from testbed.experiment.emulation import row_bytes
from testbed.experiment.workload import Window, choose
from testbed.policies.base import Policy
from testbed.policies.steering import Steered
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase
from testbed.wire.sockets import StationSocket

Progress = Callable[[str, int, int], None]


class BaseStation:
    """Owns the socket, so it must be used by the thread that makes it."""

    def __init__(
        self,
        config: RunConfig,
        split_dir: Path,
        manifest: Manifest,
        sockets: StationSocket,
        recorder: Recorder,
        policy: Policy,
        *,
        enrolled: dict[str, str] | None,
        begin_prompt: Callable[[int, int, bool], float],
        estimates: Estimates,
        band: Band | None = None,
    ) -> None:
        """`begin_prompt(policy, prompt, continued)` is told before each prompt and answers with its dilation."""
        torch.set_num_threads(1)  # the nodes need the other cores
        torch.manual_seed(config.seed)
        timeouts, wire = config.timeouts, config.wire
        self._config, self._manifest = config, manifest
        self._recorder, self._begin_prompt = recorder, begin_prompt
        self._registry = Registry(manifest, int(timeouts.silence_s * 1e9))
        self._station = Station(
            sockets,
            self._registry,
            run=secrets.randbits(62),
            enrolled=enrolled,
            heartbeat_ns=int(timeouts.heartbeat_s * 1e9),
            window_bytes=wire.window_bytes,
            on_event=recorder.event,
        )
        padded_width = config.emulation.as_if_width or 0
        settings = WireSettings(wire.down, wire.up, wire.part_bytes, wire.window_bytes, padded_width, timeouts.reply_s)
        self.session = Session(
            policy,
            WirelessDispatcher(self._station, settings),
            estimates,
            self._registry.nodes,
            recorder=recorder,
            keep_scores=config.log.scores != "none",
            fail_on_orphans=config.on_loss.orphaned == "fail",
            probe_after_s=config.estimator.probe_after_s if config.estimator.estimates == "online" else None,
            band=band,
        )
        self._model = load_bs_model(split_dir, manifest, config.model.dtype, IMPLEMENTATION)
        attach(self._model, manifest, self.session)
        self._model.register_forward_pre_hook(self._note_phase, with_kwargs=True)
        keep_what_is_loaded()
        self._tokenizer = AutoTokenizer.from_pretrained(split_dir)
        work = config.workload
        self.workload = choose(
            self._token_ids,
            score=work.score_prompts,
            score_tokens=work.score_tokens,
            generate=work.generate_prompts if work.new_tokens else 0,
            prompt_tokens=work.prompt_tokens,
        )

    def _token_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _note_phase(self, _model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One new token per sequence is decoding, more are prefill."""
        input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        one_token = input_ids.shape[-1] == 1
        self.session.phase = GenerationPhase.DECODE if one_token else GenerationPhase.PREFILL

    def wait_for_nodes(self, still_possible: Callable[[], None]) -> None:
        """Until every node has joined; see Station.wait_for_all."""
        started_s = time.monotonic()
        self._station.wait_for_all(self._config.timeouts.join_s, still_possible)
        self._recorder.event("all_joined", after_s=time.monotonic() - started_s)

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

    def begin(self, policy: int, prompt: int, *, continued: bool) -> None:
        """Let channel and nodes become those of this prompt."""
        self.session.begin_prompt(prompt, self._begin_prompt(policy, prompt, continued))

    def emulated(self) -> dict[str, Any]:
        """What the nodes said of themselves when they joined."""
        return {node.name: node.emulated for node in self._registry.nodes if node.emulated}

    @torch.inference_mode()
    def run_policy(self, index: int, policy: Policy, label: str, progress: Progress) -> None:
        """Score and continue every window of the workload under one policy."""
        session, total = self.session, len(self.workload.scored) + len(self.workload.continued)
        spec = self._config.policies[index]
        session.policy, session.policy_index, session.plan = policy, index, BandPlan(spec.bandwidth, spec.period)
        try:
            for prompt, window in enumerate((*self.workload.scored, *self.workload.continued)):
                progress(label, prompt, total)
                continued = prompt >= len(self.workload.scored)
                self.begin(index, prompt, continued=continued)
                (self._continue if continued else self._score)(index, prompt, window)
                self._note_strength(index, prompt, policy)
        finally:
            session.settle()  # also the round that ended the run
        progress(label, total, total)

    def _note_strength(self, index: int, prompt: int, policy: Policy) -> None:
        """Log where steering has come to."""
        if isinstance(policy, Steered):
            facts = {"strength": policy.strength, "saturated_rounds": policy.saturated_rounds}
            self._recorder.event("steered", policy=index, prompt=prompt, phase=int(self.session.phase), **facts)

    def _score(self, policy: int, prompt: int, window: Window) -> None:
        """Log how well the model predicts each next token of the window."""
        token_ids = torch.tensor([window.token_ids])
        logits_TV = self._model(input_ids=token_ids[:, :-1], use_cache=False).logits[0].float()
        self.session.settle()
        target_T = token_ids[0, 1:]
        self._recorder.event(
            "scored",
            policy=policy,
            prompt=prompt,
            path=window.path,
            tokens=len(target_T),
            nats=torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="sum").item(),
            correct=int((logits_TV.argmax(-1) == target_T).sum()),
        )

    def _continue(self, policy: int, prompt: int, window: Window) -> None:
        """Log a greedy continuation with the KV cache, and when each of its tokens was there."""
        token_ids = torch.tensor([window.token_ids])
        stamps = TokenStamps()
        generated = self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            max_new_tokens=self._config.workload.new_tokens,
            min_new_tokens=self._config.workload.new_tokens,
            do_sample=False,
            streamer=stamps,
        )
        self.session.settle()
        self._recorder.event(
            "generated",
            policy=policy,
            prompt=prompt,
            path=window.path,
            token_s=stamps.token_s(),
            text=self._tokenizer.decode(generated[0, token_ids.shape[1] :]),
        )

    def say_goodbye(self) -> None:
        self._station.say_goodbye(self._config.timeouts.drain_s)


class TokenStamps(BaseStreamer):
    """Hears of the prompt first, then of every generated token."""

    def __init__(self) -> None:
        self._stamps_ns: list[int] = []

    def put(self, _value: Any) -> None:
        self._stamps_ns.append(time.monotonic_ns())

    def end(self) -> None:
        """Nothing is held back."""

    def token_s(self) -> list[float]:
        """Seconds that each decoded token took: the first one came out of the prefill."""
        tokens = self._stamps_ns[1:]
        return [(later - earlier) / 1e9 for earlier, later in pairwise(tokens)]
