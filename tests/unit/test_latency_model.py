"""Eq. 4."""

from __future__ import annotations

from testbed.latency.model import expert_flop_per_row


def test_a_mixtral_expert_takes_about_352_megaflop_per_token() -> None:
    assert expert_flop_per_row(4096, 14336) == 352_393_216


def test_without_a_gate_there_is_one_projection_up_and_no_product() -> None:
    assert expert_flop_per_row(10, 100, gated=False) == 2 * 10 * 100 + 2 * 100 * 10 + 4 * 100
