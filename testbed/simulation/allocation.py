"""How the band is shared out in every block of every draw, by what a base station knows: `State`, and its own loads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bs_node.band import RECENT_BLOCKS
from testbed.config import PolicySpec
from testbed.errors import ConfigError
from testbed.policies.bandwidth import period_shares, proportional_shares
from testbed.policies.base import FloatArray, State
from testbed.simulation.draws import Draws
from testbed.simulation.kernels import Floats, Ints, best_shares


@dataclass(frozen=True, slots=True)
class Allocation:
    """As a [[policy]] table has it. With the period `prompt` the loads of recent blocks decide as a prompt begins, the
    first prompt following on the last; with `static` those of the first RECENT_BLOCKS at the mean channel, for good."""

    bandwidth: str = "even"  # even, proportional or optimal
    period: str = "block"  # block, prompt or static
    static_share_N: FloatArray | None = None

    @classmethod
    def of(cls, spec: PolicySpec) -> Allocation:
        return cls(spec.bandwidth, spec.period)

    @property
    def is_even(self) -> bool:
        return self.bandwidth == "even"

    @property
    def is_quick(self) -> bool:
        """Compiled: no call per draw."""
        return self.is_even or self.period != "prompt"

    def check(self, draws: Draws) -> None:
        """Raises ConfigError where shares are asked for of a band that cannot be shared out."""
        if not self.is_even:
            check_band(draws)

    def shares(self, rows_DBN: Ints, experts_DBN: Ints, draws: Draws, prompt_B: Ints) -> Floats | None:
        """share_DBN of the band; None for even ones."""
        if self.is_even:
            return None
        if self.period == "static" and self.static_share_N is not None:
            return np.broadcast_to(self.static_share_N, rows_DBN.shape)
        if self.period == "prompt":
            return self._by_prompt(rows_DBN, experts_DBN, draws, prompt_B)
        if self.bandwidth == "proportional":
            total_DB1 = rows_DBN.sum(axis=2, keepdims=True)
            share_DBN: Floats = np.where(total_DB1 > 0, rows_DBN / np.maximum(total_DB1, 1), 1 / draws.devices)
            return share_DBN
        share_DBN = np.zeros(rows_DBN.shape)
        best_shares(
            rows_DBN, experts_DBN, draws.base_s_DN, draws.expert_s_DN, draws.compute_row_s_DN,
            draws.row_bits_W, draws.snr_hz_DWN, draws.bandwidth_hz, share_DBN,
        )  # fmt: skip
        return share_DBN

    def _by_prompt(self, rows_DBN: Ints, experts_DBN: Ints, draws: Draws, prompt_B: Ints) -> Floats:
        share_DBN = np.empty(rows_DBN.shape)
        for prompt in set(prompt_B.tolist()):
            mine = np.flatnonzero(prompt_B == prompt)
            recent = recent_blocks(mine, len(prompt_B))
            for draw in range(len(draws)):
                loads = rows_DBN[draw, recent], experts_DBN[draw, recent]
                share_DBN[draw, mine] = self.for_period(*loads, draws.state(draw))
        return share_DBN

    def for_period(self, rows_BN: Ints, experts_BN: Ints, state: State) -> FloatArray:
        """share_N for blocks to come, from the loads of recent ones."""
        if self.bandwidth == "proportional":
            return proportional_shares(rows_BN.sum(axis=0))
        return period_shares(rows_BN, experts_BN, state)


def recent_blocks(mine: Ints, blocks: int) -> Ints:
    """The blocks before a prompt's own, as many as a base station remembers; an only prompt repeats itself."""
    others = blocks - len(mine) or blocks
    recent: Ints = (mine[0] - 1 - np.arange(min(RECENT_BLOCKS, others))) % blocks
    return recent


def check_band(draws: Draws) -> None:
    """Raises ConfigError where there is no band to share out."""
    if not draws.bandwidth_hz > 0:
        raise ConfigError(
            'bandwidth: links that share the airtime (medium = "shared") or follow a trace have no band to share out; '
            'use bandwidth = "even", or medium = "fdd" without a trace'
        )
