"""Figures of a heartbeat that the base station knows by name: a board's total power, and how old that sample is."""

from __future__ import annotations

from collections.abc import Mapping

TOTAL_POWER_W = "tot_w"
BOARD_AGE_S = "board_age_s"  # since the board was sampled, when the heartbeat was sent
TOTAL_RAIL = "tot_rail:"  # a figure is a number, so what follows in this one's name is the rail; its value is 1
SUM_OF_RAILS = "sum"  # in place of a rail's name, on boards where none carries the total (AGX Orin, AGX Xavier)
BOARD_INTERVAL_S = 1.0  # between two samples of a board


def total_rail(figures: Mapping[str, float | None]) -> str | None:
    """The rail that total power was measured on; None where the node does not say."""
    return next((name[len(TOTAL_RAIL) :] for name in figures if name.startswith(TOTAL_RAIL)), None)
