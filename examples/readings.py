"""Two other readings of the paper's Algorithm 1, as policies: `name = "examples.readings:WLRAtMost"` in a run file.

`testbed.policies.wlr` reads it as "drop where kappa < theta, then divide the survivors by their sum". What the other
readings change is measured in docs/paper.md.
"""

from __future__ import annotations

import numpy as np

from testbed.policies.base import DROPPED, BoolArray, FloatArray, IntArray, Routing, Selection, State
from testbed.policies.selection import device_of_pair, finish
from testbed.policies.wlr import WLR


class WLRAtMost:
    """Drops at kappa <= theta, as the paper's text has it; its Algorithm 1 has kappa < theta.

    The two differ where kappa is theta exactly: for theta = 0 at pairs of weight 0, for theta = 0.5 where the ratios of
    a token are all equal, otherwise by chance. A token's pair of largest ratio stays in any case.
    """

    name = "wlr_at_most"

    def __init__(self, theta: float = 0.2) -> None:
        self.params = {"theta": theta}

    def select(self, routing: Routing, state: State) -> Selection:
        device_TK = device_of_pair(routing, state)
        ratio_TK = _weight_to_latency(routing, state, device_TK)
        best_T1 = np.fmax.reduce(ratio_TK, axis=1, keepdims=True)
        low_TK = (best_T1 > 0) & (ratio_TK <= self.params["theta"] * (ratio_TK + best_T1))  # an unknown ratio never is
        return finish(routing, np.where(low_TK & ~_first_best(ratio_TK), DROPPED, device_TK))


class WLRSoftmax:
    """Algorithm 1 with its last line taken literally: a softmax over the weights that are left, not over their logits.

    The weights are probabilities already, from 0 to 1, and a softmax of them lies between 1 : e and e : 1. So theta = 0
    is not the unmodified model, and every token's weights come out more even than its gate meant them.
    """

    name = "wlr_softmax"

    def __init__(self, theta: float = 0.2) -> None:
        self._drops = WLR(theta)
        self.params = self._drops.params

    def select(self, routing: Routing, state: State) -> Selection:
        device_TK = self._drops.select(routing, state).device_TK
        exp_TK = np.where(device_TK == DROPPED, 0, np.exp(routing.weight_TK))
        total_T1 = exp_TK.sum(axis=1, keepdims=True)
        weight_TK = np.divide(exp_TK, total_T1, out=np.zeros_like(exp_TK), where=total_T1 > 0)
        return Selection(device_TK, weight_TK.astype(routing.weight_TK.dtype))


def _weight_to_latency(routing: Routing, state: State, device_TK: IntArray) -> FloatArray:
    """WLR (Eq. 9) of every pair; NaN where no device holds the expert or its latency is unknown."""
    token_s_TK = np.append(state.token_s_N, np.nan)[device_TK]  # DROPPED is -1: the appended NaN
    ratio_TK: FloatArray = routing.weight_TK / token_s_TK
    return ratio_TK


def _first_best(ratio_TK: FloatArray) -> BoolArray:
    best_T = np.where(np.isnan(ratio_TK), -np.inf, ratio_TK).argmax(axis=1)
    first_TK: BoolArray = np.arange(ratio_TK.shape[1]) == best_T[:, None]
    return first_TK
