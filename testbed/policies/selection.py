"""What every policy needs: where a pair would be computed, and what is left of the weights when pairs are dropped.

A pair is (token, selected expert). An id outside 0..E-1 is the gate's way to say "no expert" (ZAYA skips tokens so): it
is not part of the routing, has no device, counts neither as kept nor as dropped, and its weight enters no sum.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.native import native, read, write
from testbed.policies.base import DROPPED, BoolArray, FloatArray, IntArray, Routing, Selection, State


def routed(routing: Routing) -> BoolArray:
    """Which pairs name an expert at all, as bool_TK: the ones that can be kept or dropped."""
    experts = routing.holds_NE.shape[1]
    routed_TK: BoolArray = (routing.expert_TK >= 0) & (routing.expert_TK < experts)
    return routed_TK


def device_of_pair(routing: Routing, state: State) -> IntArray:
    """device_TK: the available device with the least token_s that holds the pair's expert; DROPPED where there is none.

    A device of unknown latency is worse than any known one, but usable. Ties go to the lowest index. A device that is
    away is simply not here: the ratio of Algorithm 1 never sees it as t = infinity.
    """
    expert_TK = np.ascontiguousarray(routing.expert_TK, np.int64)
    token_s_N = np.ascontiguousarray(state.token_s_N, np.float64)
    device_TK = np.empty_like(expert_TK)
    _fastest_holders(expert_TK, routing.holds_NE, token_s_N, state.available_N, device_TK)
    return device_TK


@native(
    read(types.int64, 2), read(types.boolean, 2), read(types.float64, 1), read(types.boolean, 1), write(types.int64, 2)
)
def _fastest_holders(
    expert_TK: NDArray[np.int64],
    holds_NE: BoolArray,
    token_s_N: NDArray[np.float64],
    available_N: BoolArray,
    device_TK: NDArray[np.int64],
) -> int:
    devices, experts = holds_NE.shape
    device_E = np.full(experts, DROPPED)
    for expert in range(experts):
        least_s = np.inf
        for device in range(devices):
            if holds_NE[device, expert] and available_N[device]:
                token_s = token_s_N[device] if token_s_N[device] > 0 else np.inf  # NaN is not above 0
                if device_E[expert] == DROPPED or token_s < least_s:
                    device_E[expert], least_s = device, token_s
    for token in range(expert_TK.shape[0]):
        for choice in range(expert_TK.shape[1]):
            expert = expert_TK[token, choice]
            device_TK[token, choice] = device_E[expert] if 0 <= expert < experts else DROPPED
    return 0


def rescale(weight_TK: FloatArray, kept_TK: BoolArray) -> FloatArray:
    """Give the survivors of each token the sum that the gate gave it: w * keep * sum(w) / sum(w * keep).

    The final "Softmax(w)" of Algorithm 1 is read as a softmax over the surviving router logits, which is to divide the
    surviving probabilities by their sum; for families whose weights do not sum to 1 their own sum is kept. A row of
    which nothing is dropped passes unchanged, bit for bit. One without survivors (an orphaned token: its expert output
    is 0, the residual passes), or with survivors of weight 0 only, becomes zeros. The dtype stays.
    """
    if kept_TK.all():
        return weight_TK
    survivor_TK = np.where(kept_TK, weight_TK, 0)
    total_T1 = weight_TK.sum(axis=1, keepdims=True, dtype=np.float64)
    left_T1 = survivor_TK.sum(axis=1, keepdims=True, dtype=np.float64)
    share_TK = np.divide(survivor_TK, left_T1, out=np.zeros(weight_TK.shape), where=left_T1 > 0)
    intact_T1 = kept_TK.all(axis=1, keepdims=True)
    return np.where(intact_T1, weight_TK, (share_TK * total_T1).astype(weight_TK.dtype))


def dropped_share(routing: Routing, selection: Selection) -> float:
    """Share of the gate's weight, 0 to 1, that is not computed by the expert the gate chose: dropped, or replaced."""
    weight_TK = np.where(routed(routing), routing.weight_TK, 0)
    gone_TK = selection.device_TK == DROPPED
    if selection.expert_TK is not None:
        gone_TK = gone_TK | (selection.expert_TK != routing.expert_TK)
    total = float(weight_TK.sum())
    return float(weight_TK[gone_TK].sum()) / total if total > 0 else 0.0


def finish(routing: Routing, device_TK: IntArray) -> Selection:
    """The answer that sends each pair to device_TK and rescales what is kept.

    A pair without an expert gets weight 0 and leaves the weights of its token alone, as the model itself treats it.
    """
    sent_TK = device_TK != DROPPED
    return Selection(device_TK, surviving_weights(routing, sent_TK))


def surviving_weights(routing: Routing, kept_TK: BoolArray) -> FloatArray:
    """The gate's weights once only `kept_TK` is left: `rescale`, a pair without an expert standing apart."""
    if np.count_nonzero(kept_TK) == kept_TK.size:  # a third of the cost of asking for all()
        return routing.weight_TK
    routed_TK = routed(routing)
    return rescale(np.where(routed_TK, routing.weight_TK, 0), kept_TK | ~routed_TK)


def arrived_weights(selection: Selection, arrived_TK: BoolArray) -> FloatArray:
    """A selection's weights once only what has arrived is left: each token keeps its sum."""
    sent_TK = selection.device_TK != DROPPED
    return rescale(np.where(sent_TK, selection.weight_TK, 0), arrived_TK | ~sent_TK)
