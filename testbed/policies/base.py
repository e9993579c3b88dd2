"""What a policy is given and what it answers.

T tokens, K experts chosen by the gate for each, E experts, N devices. A policy is a pure function of these values:
no socket, no clock, no torch. The log keeps exactly them, so that a recorded run can be replayed under another policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]
BoolArray = NDArray[np.bool_]

DROPPED = -1


@dataclass(frozen=True, slots=True)
class Routing:
    """The gate's answer for one MoE block, and where its experts live."""

    layer: int
    expert_TK: IntArray
    weight_TK: FloatArray  # as the gate gave them; they need not sum to 1
    holds_NE: BoolArray  # device n holds expert e of this layer
    score_TE: FloatArray | None = None  # the weight every expert would have had, where the gate tells


@dataclass(frozen=True, slots=True)
class Air:
    """What the base station knows of the links whose band it shares out (its CSI). W: down, up. Unknown is NaN.

    A link that is given B Hz carries B log2(1 + snr_hz / B) bit/s (Eq. 2, 3), snr_hz being P g^2 / N0. Where rates are
    shaped and no spectrum is shared (Wi-Fi, Ethernet), "Hz" are bit/s, snr_hz is infinite and a link carries B.
    """

    bandwidth_hz: float  # in total; every device has an even part of it unless a selection says otherwise
    snr_hz_WN: FloatArray
    row_s_WN: FloatArray  # of a row on the air, at the even split: part of State.row_s_N


@dataclass(frozen=True, slots=True)
class State:
    """What the base station knows of its devices, at the even split of the band. Unknown is NaN, never 0."""

    token_s_N: FloatArray  # time of one token alone on the device: down, compute, up (Eq. 6)
    available_N: BoolArray
    age_s_N: FloatArray  # since the estimate was last taught
    base_s_N: FloatArray  # cost of a round: base + experts touched * expert + rows * row
    expert_s_N: FloatArray
    row_s_N: FloatArray
    air: Air | None = None  # None where there is no band to share out

    def cost_s_N(self, rows_N: IntArray, experts_N: IntArray) -> FloatArray:
        """Predicted seconds of a round in which device n gets rows_N[n] rows for experts_N[n] experts; 0 if none."""
        cost = self.base_s_N + experts_N * self.expert_s_N + rows_N * self.row_s_N
        return np.where(rows_N > 0, cost, 0.0)


class Deadline(NamedTuple):
    """When to stop waiting: `after_s` after every token has `k_min` answers. What is not there then counts as late."""

    k_min: int
    after_s: float


@dataclass(frozen=True, slots=True)
class Selection:
    """Which pairs (token, expert) are computed, where, and with which weight."""

    device_TK: IntArray  # DROPPED (-1) for a pair that is not sent
    weight_TK: FloatArray  # 0 for a dropped pair; the survivors of a token keep the gate's sum
    bandwidth_share_N: FloatArray | None = None  # of the band, summing to 1; None: what the run file's period says
    expert_TK: IntArray | None = None  # what is computed, where that is not what the gate chose
    deadline: Deadline | None = None


@runtime_checkable
class Policy(Protocol):
    """A selection rule. `name` and `params` are what the log and the table call it."""

    name: str
    params: Mapping[str, Any]

    def select(self, routing: Routing, state: State) -> Selection: ...
