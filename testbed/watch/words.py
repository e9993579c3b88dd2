"""Numbers as a terminal shows them."""

from __future__ import annotations


def plain(value: float | None) -> str:
    """Three digits at least; a dash for what is unknown."""
    return "-" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
