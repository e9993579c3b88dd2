"""The run file's model with all its experts in this process: what a policy's drops do to its predictions.

Rows pass through the run file's wire schemes both ways and a policy is told Eq. 6 of the prompt's channel, so that
perplexity and accuracy are those of a run with `estimates = "oracle"`. They are measured; the latencies are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bs_node.blocks import Block, Float32, Outcome
from bs_node.dispatcher import NOBODY, ExchangeTimes, Hidden, InProcessDispatcher, LocalExperts, Watcher
from bs_node.model import load_bs_model, load_tokenizer
from bs_node.registry import Node
from bs_node.remote_experts import IMPLEMENTATION, attach
from bs_node.round import EarlyEnd
from bs_node.session import Session
from jetson_node.experts import make_experts
from testbed.checkpoint.manifest import Manifest
from testbed.config import RunConfig
from testbed.experiment.emulation import row_bytes
from testbed.experiment.workload import Window, choose
from testbed.latency.known import KnownLatencies
from testbed.policies.base import BoolArray, FloatArray, Policy, Routing, Selection, State
from testbed.policies.topk import TopK
from testbed.runlog.schema import Status
from testbed.simulation.allocation import Allocation
from testbed.simulation.draws import Draws
from testbed.simulation.montecarlo import times_of
from testbed.simulation.routing import RoutedBlock
from testbed.wire.quantization import SCHEMES, Scheme, dequantise, quantise

NEVER_NS = 2**62


class Quality(NamedTuple):
    """Over all predicted tokens of the workload."""

    perplexity: float
    accuracy: float


class ModelInProcess:
    """Scores the run file's workload under any policy."""

    def __init__(self, config: RunConfig, split_dir: Path, manifest: Manifest) -> None:
        torch.set_num_threads(1)  # as in a run: bits of a product depend on it
        torch.manual_seed(config.seed)
        schemes = SCHEMES[config.wire.down], SCHEMES[config.wire.up]
        experts = [
            OverTheWire(
                make_experts(split_dir, manifest, device.name, backend=device.backend, dtype=config.model.dtype),
                *schemes,
            )
            for device in config.devices
        ]
        self._dispatcher = TimedDispatcher(experts)
        self._latencies = GivenState(len(experts), *row_bytes(config, manifest))
        nodes = [Node(n, device.name, routing_id=b"in this process") for n, device in enumerate(config.devices)]
        self._session = Session(TopK(), self._dispatcher, self._latencies, nodes, keep_scores=False)
        model = config.model
        self._model = load_bs_model(split_dir, manifest, model.dtype, IMPLEMENTATION, trusted=model.trust_remote_code)
        attach(self._model, manifest, self._session)
        self._tokenizer = load_tokenizer(split_dir, manifest)
        work = config.workload
        chosen = choose(
            self._token_ids, score=work.score_prompts, score_tokens=work.score_tokens, generate=0, prompt_tokens=1
        )
        self._windows = chosen.scored

    def _token_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def routing(self, channel: Draws) -> list[RoutedBlock]:
        """What the gate chooses in the whole workload where nothing is dropped."""
        heard = _Listener(TopK())
        blocks: list[RoutedBlock] = []
        for prompt, window in enumerate(self._windows):
            self._begin(heard, Allocation(), channel, prompt)
            self._nats_and_correct(window)
            blocks += [RoutedBlock(prompt, routing) for routing in heard.take()]
        return blocks

    def score(self, policy: Policy, allocation: Allocation, channel: Draws) -> Quality:
        """Perplexity and next-token accuracy; draw p of `channel` is that of prompt p."""
        nats, correct, predicted = 0.0, 0, 0
        for prompt, window in enumerate(self._windows):
            self._begin(policy, allocation, channel, prompt)
            more_nats, more_correct = self._nats_and_correct(window)
            nats, correct, predicted = nats + more_nats, correct + more_correct, predicted + len(window.token_ids) - 1
        return Quality(float(np.exp(nats / predicted)), correct / predicted)

    def _begin(self, policy: Policy, allocation: Allocation, channel: Draws, prompt: int) -> None:
        self._session.policy, self._session.prompt = policy, prompt
        self._latencies.given = channel.state(prompt)
        self._dispatcher.begin(allocation, channel.part(prompt, prompt + 1))

    @torch.inference_mode()
    def _nats_and_correct(self, window: Window) -> tuple[float, int]:
        token_ids = torch.tensor([window.token_ids])
        logits_TV = self._model(input_ids=token_ids[:, :-1], use_cache=False).logits[0].float()
        self._session.settle()
        target_T = token_ids[0, 1:]
        nats = torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="sum").item()
        return nats, int((logits_TV.argmax(-1) == target_T).sum())


class OverTheWire:
    """A device's experts behind the wire format: what they see and what they answer was quantised."""

    def __init__(self, experts: LocalExperts, down: Scheme, up: Scheme) -> None:
        self._experts, self._down, self._up = experts, down, up

    def compute(self, layer: int, segments: Sequence[tuple[int, int]], x_RD: Float32) -> Float32:
        return _transmitted(self._experts.compute(layer, segments, _transmitted(x_RD, self._down)), self._up)


def _transmitted(rows_RD: Float32, scheme: Scheme) -> Float32:
    """The rows as the other side decodes them."""
    rows, width = rows_RD.shape
    received_RD = np.empty_like(rows_RD)
    dequantise(quantise(rows_RD, scheme).tobytes(), rows, width, scheme, received_RD)
    return received_RD


class TimedDispatcher(InProcessDispatcher):
    """Replies come in the order of the devices' simulated times, and a round's deadline is kept."""

    def begin(self, allocation: Allocation, channel: Draws) -> None:
        """From now on the channel is that of this one draw."""
        self._allocation, self._channel = allocation, channel

    def exchange(
        self,
        number: int,
        layer: int,
        hidden_TD: Hidden,
        blocks: Sequence[Block],
        watcher: Watcher = NOBODY,
        early_end: EarlyEnd | None = None,
    ) -> tuple[list[Outcome], ExchangeTimes]:
        if early_end is None:
            return super().exchange(number, layer, hidden_TD, blocks, watcher)
        watcher.sent()
        alone = watcher._replace(sent=NOBODY.sent)
        outcomes, deadline_ns = [], NEVER_NS
        for at_ns, block in sorted(zip(self._at_ns(blocks), blocks, strict=True), key=itemgetter(0)):
            if at_ns > deadline_ns:
                outcomes.append(Outcome(block, Status.LATE))
                continue
            answered, _ = super().exchange(number, layer, hidden_TD, [block], alone)
            outcomes += answered
            deadline_ns = early_end.deadline_ns(answered[0], at_ns, deadline_ns)
        return outcomes, ExchangeTimes()

    def _at_ns(self, blocks: Sequence[Block]) -> list[int]:
        """When each block's reply would be there."""
        rows_DBN = np.zeros((1, 1, self._channel.devices), np.int64)
        experts_DBN = np.zeros_like(rows_DBN)
        for block in blocks:
            rows_DBN[0, 0, block.device], experts_DBN[0, 0, block.device] = block.rows, len(block.segments)
        share_DBN = self._allocation.shares(rows_DBN, experts_DBN, self._channel, np.zeros(1, np.int64))
        device_s_N = times_of(rows_DBN, experts_DBN, self._channel, share_DBN)[0, 0]
        return [int(device_s_N[block.device] * 1e9) for block in blocks]


class GivenState(KnownLatencies):
    """Says what it is given, and learns nothing."""

    given: State

    def state(self, phase: int, available_N: BoolArray, now_s: float) -> State:  # noqa: ARG002 - as all estimates
        return self.given

    def air_row_s_WN(self) -> FloatArray:
        """Seconds of one row on the air, down and up."""
        return super().air_row_s_WN() if self.given.air is None else self.given.air.row_s_WN


class _Listener:
    """A policy that remembers what it was asked."""

    name = "listener"

    def __init__(self, policy: Policy) -> None:
        self.params = policy.params
        self._policy = policy
        self._heard: list[Routing] = []

    def select(self, routing: Routing, state: State) -> Selection:
        self._heard.append(routing)
        return self._policy.select(routing, state)

    def take(self) -> list[Routing]:
        """Everything since the last call."""
        heard, self._heard = self._heard, []
        return heard
