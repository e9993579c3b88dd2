"""Who gets how much of the band in each round, and having it enforced."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from bs_node.blocks import Block
from testbed.latency.csi import Csi
from testbed.policies.bandwidth import block_shares, period_shares, proportional_shares, rate_ratio, rates_bits_per_s
from testbed.policies.base import Air, FloatArray, IntArray, State

Split = Literal["even", "proportional", "optimal"]
Period = Literal["block", "prompt", "static"]
RECENT_BLOCKS = 32  # what a split for more than one block is made for
IDLE_SHARE = 0.02  # of the even part: what a device without rows keeps, for heartbeats and probes


class BandPlan:
    """The split of the band under one policy: by each block's own load, or by those of recent blocks.

    period: `block`; `prompt`, made anew as each begins; `static`, made once, as the first prompt begins after
    RECENT_BLOCKS have been seen. As long as there is nothing to go by, the split is even.
    """

    def __init__(self, split: Split = "even", period: Period = "block") -> None:
        self._split, self._period = split, period
        self._recent: deque[tuple[IntArray, IntArray]] = deque(maxlen=RECENT_BLOCKS)
        self._prompt = -1
        self._kept_share_N: FloatArray | None = None

    def share_N(self, blocks: Sequence[Block], state: State, prompt: int) -> FloatArray | None:
        """Shares of the band for the round of these blocks; None: even. Raises ConfigError without a band."""
        if self._split == "even":
            return None
        rows_N, experts_N = loads(blocks, len(state.row_s_N))
        if self._period == "block":
            proportional = self._split == "proportional"
            return proportional_shares(rows_N) if proportional else block_shares(rows_N, experts_N, state)[0]
        if prompt != self._prompt and self._is_due():
            self._kept_share_N = self._of_recent_blocks(state)
        self._prompt = prompt
        self._recent.append((rows_N, experts_N))
        return self._kept_share_N

    def _is_due(self) -> bool:
        if self._period == "static":
            return self._kept_share_N is None and len(self._recent) == RECENT_BLOCKS
        return bool(self._recent)

    def _of_recent_blocks(self, state: State) -> FloatArray:
        rows_BN, experts_BN = (np.stack(load_B) for load_B in zip(*self._recent, strict=True))
        if self._split == "proportional":
            return proportional_shares(rows_BN.sum(axis=0))
        return period_shares(rows_BN, experts_BN, state)


def loads(blocks: Sequence[Block], devices: int) -> tuple[IntArray, IntArray]:
    """Rows and different experts of each device."""
    rows_N, experts_N = np.zeros(devices, np.int64), np.zeros(devices, np.int64)
    for block in blocks:
        rows_N[block.device], experts_N[block.device] = block.rows, len(block.segments)
    return rows_N, experts_N


class Band:
    """The band as it is shared out now. `enforce` makes links keep to shares, which sum to 1."""

    def __init__(self, csi: Csi, devices: int, enforce: Callable[[FloatArray], None]) -> None:
        self._csi, self._enforce = csi, enforce
        self._even_N = np.full(devices, 1 / devices)
        self.share_N = self._even_N
        self._told = False  # what links keep to before they are told is theirs

    def air(self, row_s_WN: FloatArray) -> Air:
        """What is known of the links; row_s_WN: estimated seconds of a row on the air at the even split."""
        return self._csi.air(row_s_WN)

    def give(self, share_N: FloatArray | None) -> None:
        """Have these shares kept from now on, None being the even split. Devices without any keep a little."""
        wanted_N = self._even_N if share_N is None else with_idle(share_N)
        if not (self._told and np.array_equal(wanted_N, self.share_N)):
            self._enforce(wanted_N)
            self._told, self.share_N = True, wanted_N

    def air_ratio_WN(self, air: Air) -> FloatArray:
        """How many times the rate of the even split each link has under the shares in force; 1 where not known."""
        ratio_WN = rate_ratio(air, self.share_N)
        return np.where(np.isfinite(ratio_WN) & (ratio_WN > 0), ratio_WN, 1.0)

    def asked(self, air: Air) -> FloatArray:
        """Hz, and bit/s down and up, that every device is to have now, of shape 3N; Hz are NaN on shaped links."""
        hz_N = np.where(np.isinf(air.snr_hz_WN).all(axis=0), np.nan, self.share_N * air.bandwidth_hz)
        return np.vstack([hz_N, rates_bits_per_s(air, self.share_N)])


def with_idle(share_N: FloatArray) -> FloatArray:
    """The same shares, but devices without one keep IDLE_SHARE of the even part."""
    idle_N = np.equal(share_N, 0)
    kept = IDLE_SHARE / len(share_N)
    return np.where(idle_N, kept, share_N * (1 - kept * np.count_nonzero(idle_N)))
