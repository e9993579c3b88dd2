"""Algorithm 1 of the WDMoE paper: expert selection by weight-to-latency ratio (WLR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from testbed.errors import ConfigError
from testbed.native import inlined, native, read, write
from testbed.policies.base import DROPPED, Routing, Selection, State
from testbed.policies.selection import device_of_pair, finish
from testbed.policies.strength import Steerable


class WLR(Steerable):
    """Drops a token's expert of smallest WLR = w / t while kappa = min / (min + max) < theta (Eq. 10), for any k.

    Our readings of what the paper leaves open:
    - w are the gate's weights (probabilities, not logits: a ratio needs w >= 0). kappa does not change when all weights
      of a token, or all latencies, are scaled alike, so families whose weights do not sum to 1 need nothing special.
    - t is State.token_s_N of the device that will serve the pair: one token alone (Eq. 6), not its share of a queue.
    - The text drops at kappa <= theta, Algorithm 1 at kappa < theta. We take "<": theta = 0 is exactly `TopK`.
    - A device that is away is handled before the ratio: its pair is dropped, the rest is decided as usual.
    - A pair on a device of unknown latency takes no part in the ratio and is not dropped.
    - "The process can be repeated" for k > 2: it is, until kappa >= theta or one pair is left (`below_threshold`).

    Raises ConfigError where theta is not a number from 0 to 0.5, the range of kappa.
    """

    name = "wlr"
    strength_name = "theta"

    def __init__(self, theta: float = 0.2) -> None:
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta <= 0.5:
            raise ConfigError(f"policy wlr: theta must be a number from 0 to 0.5, the range of kappa, not {theta!r}")
        self.params: Mapping[str, Any] = {"theta": float(theta)}

    def select(self, routing: Routing, state: State) -> Selection:
        device_TK = np.ascontiguousarray(device_of_pair(routing, state), np.int64)
        weight_TK = np.ascontiguousarray(routing.weight_TK, np.float64)
        _drop_below(weight_TK, np.ascontiguousarray(state.token_s_N, np.float64), self.params["theta"], device_TK)
        return finish(routing, device_TK)


@inlined
def below_threshold(ratio: Any, best: Any, theta: Any) -> Any:
    """Whether Algorithm 1, repeated until kappa >= theta or one pair is left, drops a pair of this ratio.

    The loop never drops the maximum (its own kappa is 0.5), so each step compares the smallest ratio left with the same
    maximum: a pair goes if its own ratio / (ratio + max) < theta. Ties need no rule, because pairs of equal ratio share
    one fate, and the order of tokens or experts cannot matter. Where all ratios are 0, kappa is undefined: none goes.
    """
    return best > 0 and ratio / (ratio + best) < theta


@native(read(types.float64, 2), read(types.float64, 1), types.float64, write(types.int64, 2))
def _drop_below(
    weight_TK: NDArray[np.float64], token_s_N: NDArray[np.float64], theta: float, device_TK: NDArray[np.int64]
) -> int:
    """Takes the device from each pair that is dropped. A latency that is not above 0 and finite is unknown."""
    ratio_K = np.empty(device_TK.shape[1])
    for token in range(device_TK.shape[0]):
        best = 0.0
        for choice in range(device_TK.shape[1]):
            device = device_TK[token, choice]
            token_s = token_s_N[device] if device != DROPPED else np.nan
            ratio_K[choice] = weight_TK[token, choice] / token_s if 0 < token_s < np.inf else np.nan
            best = np.fmax(best, ratio_K[choice])
        for choice in range(device_TK.shape[1]):
            if below_threshold(ratio_K[choice], best, theta):
                device_TK[token, choice] = DROPPED
    return 0
