"""A family's model with its experts on nodes of this process, behind the base station's own hook."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bs_node.dispatcher import InProcessDispatcher
from bs_node.model import experts_of, load_bs_model
from bs_node.registry import Node
from bs_node.remote_experts import IMPLEMENTATION, attach
from bs_node.session import Session
from jetson_node.experts import make_experts
from testbed.checkpoint.manifest import load_manifest
from testbed.checkpoint.split import split
from testbed.latency.estimator import Estimator
from testbed.policies.base import Policy, Routing, Selection, State

DEVICES = ("near", "mid", "far")
TOKEN_S_N = np.array([1e-3, 4e-3, 16e-3])  # what a policy is told that a row costs on each device
NEW_TOKENS = 5


@dataclass
class Told:
    """A policy that is told these latencies, and whose answers are kept."""

    policy: Policy
    answers: list[tuple[Routing, Selection]] = field(default_factory=list)
    name: str = "told"
    params: Mapping[str, Any] = field(default_factory=dict)

    def select(self, routing: Routing, state: State) -> Selection:
        nothing_N = np.zeros(len(TOKEN_S_N))
        known = replace(state, token_s_N=TOKEN_S_N, base_s_N=nothing_N, expert_s_N=nothing_N, row_s_N=TOKEN_S_N)
        selection = self.policy.select(routing, known)
        self.answers.append((routing, selection))
        return selection


class NextExpert:
    """Asks, for every pair, the expert after the one that the gate chose: what no comparison may overlook."""

    name = "next"
    params: Mapping[str, Any] = {}

    def select(self, routing: Routing, state: State) -> Selection:  # noqa: ARG002
        expert_TK = (routing.expert_TK + 1) % routing.holds_NE.shape[1]
        return Selection(routing.holds_NE.argmax(0)[expert_TK], routing.weight_TK, expert_TK=expert_TK)


def distributed(model_dir: Path, split_dir: Path, policy: Policy) -> tuple[Any, Session]:
    """Splits the checkpoint, in fp32, unless that is done already; each device's experts come from its shard."""
    if not split_dir.exists():
        split(model_dir, split_dir, DEVICES, dtype="float32")
    manifest = load_manifest(split_dir)
    model = load_bs_model(split_dir, manifest, "float32", IMPLEMENTATION)
    experts = [make_experts(split_dir, manifest, device, backend="torch") for device in DEVICES]
    nodes = [Node(n, device, routing_id=b"x", boot_id=n) for n, device in enumerate(DEVICES)]
    session = Session(policy, InProcessDispatcher(experts), Estimator(len(nodes), 100, 100), nodes)
    attach(model, manifest, session)
    return model, session


def prompt() -> torch.Tensor:
    return torch.randint(3, 256, (2, 21), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def answer(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a batch of two prompts, and the tokens that greedy decoding with the cache adds to it."""
    token_ids = prompt()
    tokens = model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        **{"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0},
    )
    return model(token_ids).logits, tokens


def assert_equal(got: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The promise is equal tokens and 1e-5; with one thread on both sides not one bit differs."""
    (logits, tokens), (plain_logits, plain_tokens) = got, expected
    assert torch.equal(tokens, plain_tokens)
    assert (logits - plain_logits).abs().max() <= 1e-5
    assert torch.equal(logits, plain_logits)


@torch.inference_mode()
def layer_calls(model: Any) -> list[tuple[Any, tuple[torch.Tensor, ...], torch.Tensor]]:
    """(experts module, what went into it, what came out) of every MoE layer, in one forward over the prompts."""
    calls: list[tuple[Any, tuple[torch.Tensor, ...], torch.Tensor]] = []

    def keep(path: str) -> Callable[..., None]:
        return lambda _module, args, out: calls.append((path, args, out.clone()))

    hooks = [module.register_forward_hook(keep(path)) for path, module in experts_of(model).items()]
    model(prompt())
    for hook in hooks:
        hook.remove()
    return calls
