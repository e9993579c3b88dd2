"""The way of a token through one MoE block, registered with transformers' experts interface.

    gate -> select -> group -> quantise, send -> ... nodes ... -> receive, combine -> record

T tokens, D hidden size, K experts chosen by the gate per token. The model itself is never patched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from time import monotonic_ns

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bs_node.blocks import Combiner, Float32, arrived, combine
from bs_node.gate import Gate
from bs_node.gpu_rows import GpuRows, to_host
from bs_node.model import experts_of
from bs_node.rows import RoundTimes
from bs_node.session import Session
from testbed.checkpoint.manifest import Manifest
from testbed.policies.base import Routing
from testbed.policies.selection import arrived_weights

IMPLEMENTATION = "wdmoe_remote"


@dataclass(frozen=True, slots=True)
class RemoteLayer:
    """What an experts module of the base station carries in place of its weights."""

    index: int
    holds_NE: NDArray[np.bool_]
    gate: Gate | None
    session: Session


def remote_experts(
    module: torch.nn.Module, hidden_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """out_TD = sum over k of weight_TK * expert(hidden_TD) (Eq. 1), the experts being elsewhere."""
    layer: RemoteLayer = module.remote  # type: ignore[assignment] # set by attach()
    session, times = layer.session, RoundTimes(monotonic_ns())

    routing = gated(layer, expert_TK, weight_TK)
    state = session.state()
    selection = session.select(routing, state)
    times.selected()

    blocks = session.group(routing, selection)
    times.grouped()

    hidden = rows_of(hidden_TD)
    combiner = Combiner(blocks, selection.weight_TK, partial(zeros_like, hidden))
    outcomes, exchange_times = session.exchange(routing, state, selection, hidden, combiner)
    times.exchanged(exchange_times)

    final_TK, out_TD = selection.weight_TK, combiner.out_TD
    if any(outcome.output is None for outcome in outcomes):
        final_TK = arrived_weights(selection, arrived(outcomes, selection.device_TK))
        out_TD = combine(outcomes, final_TK, zeros_like(hidden))
    times.combined(combiner.spent_ns)
    out = given_back(out_TD, hidden, hidden_TD, times)

    session.finish(routing, state, selection, outcomes, final_TK, times)
    return out


def is_plain(tensor: torch.Tensor) -> bool:
    """In this memory, fp32 and without a gradient: numpy can have it as it is. Asking is faster than converting."""
    return tensor.is_cpu and tensor.dtype is torch.float32 and not tensor.requires_grad


def as_float32(tensor: torch.Tensor) -> NDArray[np.float32]:
    plain = tensor if is_plain(tensor) else tensor.detach().to("cpu", torch.float32)
    return np.ascontiguousarray(plain.numpy())


def rows_of(hidden_TD: torch.Tensor) -> Float32 | GpuRows:
    return GpuRows(hidden_TD) if hidden_TD.is_cuda else as_float32(hidden_TD)


def zeros_like(hidden: Float32 | GpuRows) -> Float32:
    return hidden.zeros() if isinstance(hidden, GpuRows) else np.zeros(hidden.shape, np.float32)


def given_back(out_TD: Float32, hidden: Float32 | GpuRows, hidden_TD: torch.Tensor, times: RoundTimes) -> torch.Tensor:
    """The result where the model computes and as it does. A copy to a GPU goes on while the round is finished."""
    if isinstance(hidden, GpuRows):
        times.staging = hidden.staging
        return hidden.give_back(out_TD)
    out = torch.from_numpy(out_TD)
    return out if is_plain(hidden_TD) else out.to(hidden_TD.device, hidden_TD.dtype)


def gated(layer: RemoteLayer, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> Routing:
    """The gate's answer as plain arrays."""
    experts = (expert_TK if expert_TK.is_cpu else expert_TK.cpu()).numpy()
    weights = as_float32(weight_TK)
    scores = layer.gate.scores(experts, weights) if layer.gate is not None else None
    return Routing(layer.index, experts, weights, layer.holds_NE, scores)


def attach(model: torch.nn.Module, manifest: Manifest, session: Session) -> None:
    """Give every experts module of the base station's model its layer. Raises CheckpointError for an unknown one."""
    for path, experts in experts_of(model).items():
        layer = manifest.layer_at(path)
        gate = Gate.beside(model, path)
        experts.remote = RemoteLayer(layer.index, manifest.holds_NE(layer.index), gate, session)
        if next(model.parameters()).is_cuda:
            experts.register_forward_pre_hook(to_host)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, remote_experts)
