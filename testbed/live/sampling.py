"""How the next token is chosen from logits: options and their meaning are those of transformers' generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from testbed.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Greedy unless `do_sample`; top_k = 0 and top_p = 1 leave every token in; a `seed` makes it repeatable.

    Raises ConfigError for what says how to draw where nothing is drawn.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        drawn = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "seed": None}
        idle = [name for name, default in drawn.items() if getattr(self, name) != default]
        if idle and not self.do_sample:
            raise ConfigError(f"{', '.join(idle)}: without effect while nothing is drawn; add do_sample (--do-sample)")


class Sampler:
    """One continuation's choices, with a random generator of its own: what else is in the batch changes nothing."""

    def __init__(self, sampling: Sampling) -> None:
        """Raises ConfigError for options that transformers refuses."""
        self._sampling = sampling
        self._warpers = LogitsProcessorList()
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        if not sampling.do_sample:
            return
        try:
            if sampling.temperature != 1.0:
                self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k > 0:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))
        except ValueError as error:
            raise ConfigError(f"sampling: {' '.join(str(error).split())}") from error

    def next_token(self, logits_V: Any) -> int:
        """From the logits after the last token, on any device and of any float dtype."""
        if not self._sampling.do_sample:
            return int(logits_V.argmax())
        nothing_yet = torch.zeros((1, 0), dtype=torch.long)  # these options do not look at the text
        warped_1V = self._warpers(nothing_yet, logits_V[None].float().cpu())  # type: ignore[arg-type]
        return int(torch.multinomial(warped_1V.softmax(-1), 1, generator=self._generator))
