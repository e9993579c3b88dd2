"""The paper's latency model as formulas (WDMoE, Eq. 2-8)."""

from __future__ import annotations

ACTIVATION_FLOP = 4  # eta: exp, add, divide, multiply of one SiLU; the paper leaves it open


def expert_flop_per_row(width: int, inner: int, gated: bool = True) -> int:
    """FLOP for one token in one expert (Eq. 4): 4*m*m_h + 2*m_h*m + eta*m_h + m_h with a gate.

    width: m, the length of a row; inner: m_h, the expert's hidden size. Without a gate there is one up projection
    and no product.
    """
    up_projections = 2 if gated else 1
    product = inner if gated else 0
    return up_projections * 2 * width * inner + 2 * inner * width + ACTIVATION_FLOP * inner + product
