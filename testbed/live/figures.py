"""How fast continuations came, in the live model's time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from testbed.live.continuation import Continuation
from testbed.live.model import LiveModel


@dataclass(frozen=True, slots=True)
class Figures:
    """Seconds, emulated ones where `emulated`; None where nothing was there to be measured."""

    emulated: bool
    prompts: int
    tokens: int
    first_token_p50_s: float | None  # from the beginning of the prefill
    token_p50_s: float | None  # each further token
    token_p95_s: float | None
    tokens_per_s: float | None  # of all prompts together, from the first prefill to the last token
    block_p50_s: float | None  # one MoE block: select, exchange, combine
    block_p95_s: float | None

    def document(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """For people."""
        unit = "emulated ms" if self.emulated else "ms"
        per_s = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f}"
        return (
            f"{self.tokens} tokens; first token {_ms(self.first_token_p50_s)}, then {_ms(self.token_p50_s)} each "
            f"(p95 {_ms(self.token_p95_s)}), block {_ms(self.block_p50_s)} (p95 {_ms(self.block_p95_s)}) {unit}; "
            f"{per_s} tokens/{'emulated ' if self.emulated else ''}s"
        )


def measured(live: LiveModel, continuations: Sequence[Continuation]) -> Figures:
    """Of continuations that have ended, and of the blocks since the figures were last taken."""
    block_s = list(live.clock.block_s)
    live.clock.block_s.clear()
    begun = [continuation for continuation in continuations if continuation.token_s]
    tokens = sum(len(continuation.token_s) for continuation in begun)
    steps_s = [step_s for continuation in begun for step_s in continuation.step_s]
    took_s = max((c.token_s[-1] for c in begun), default=0.0) - min((c.began_s for c in begun), default=0.0)
    return Figures(
        live.emulated,
        len(continuations),
        tokens,
        _percentile((c.token_s[0] - c.began_s for c in begun), 50),
        _percentile(steps_s, 50),
        _percentile(steps_s, 95),
        tokens / took_s if took_s > 0 else None,
        _percentile(block_s, 50),
        _percentile(block_s, 95),
    )


def _percentile(values: Iterable[float], percent: float) -> float | None:
    listed = list(values)
    return float(np.percentile(listed, percent)) if listed else None


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.3g}"
