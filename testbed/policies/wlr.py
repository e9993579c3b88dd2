"""Algorithm 1 of the WDMoE paper: expert selection by weight-to-latency ratio (WLR)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from testbed.errors import ConfigError
from testbed.policies.base import DROPPED, BoolArray, FloatArray, Routing, Selection, State
from testbed.policies.selection import device_of_pair, finish, known_token_s


class WLR:
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

    def __init__(self, theta: float = 0.2) -> None:
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 <= theta <= 0.5:
            raise ConfigError(f"policy wlr: theta must be a number from 0 to 0.5, the range of kappa, not {theta!r}")
        self.params: Mapping[str, Any] = {"theta": float(theta)}

    def select(self, routing: Routing, state: State) -> Selection:
        device_TK = device_of_pair(routing, state)
        token_s_N1 = np.append(known_token_s(state), np.nan)  # DROPPED, as the index -1, finds the NaN at the end
        ratio_TK = routing.weight_TK / token_s_N1[device_TK]
        dropped_TK = below_threshold(ratio_TK, self.params["theta"])
        return finish(routing, np.where(dropped_TK, DROPPED, device_TK))


def below_threshold(ratio_TK: FloatArray, theta: float) -> BoolArray:
    """Which pairs Algorithm 1, repeated until kappa >= theta or one pair is left, drops. NaN: takes no part.

    The loop never drops the maximum (its own kappa is 0.5), so each step compares the smallest ratio left with the same
    maximum: a pair goes if its own ratio / (ratio + max) < theta. Ties need no rule, because pairs of equal ratio share
    one fate, and the order of tokens or experts cannot matter. Where all ratios are 0, kappa is undefined: none goes.
    """
    best_T1 = np.fmax.reduce(np.ascontiguousarray(ratio_TK.T))[:, None]
    with np.errstate(invalid="ignore"):
        kappa_TK: FloatArray = ratio_TK / (ratio_TK + best_T1)
    return kappa_TK < theta
