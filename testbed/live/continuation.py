"""One prompt and what a live model adds to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from testbed.errors import ConfigError, WdmoeError
from testbed.live.sampling import Sampler, Sampling
from testbed.live.scoring import TokenScore

CANCELLED, LENGTH, STOP, FAILED = "cancelled", "length", "stop", "failed"
Tell = Callable[[int | None], None]


class Continuation:
    """One prompt and what was added to it. Times are readings of the live model's clock."""

    def __init__(
        self,
        prompt: Any,
        sampling: Sampling,
        tell: Tell = lambda _token_id: None,
        *,
        policy: int | None = None,
        scores_top: int | None = None,
        scores_prompt: bool = False,
    ) -> None:
        """`prompt`: token ids (T,), or embeddings (T, D) where the ids stay with the user.

        `tell` hears of every token from the thread that runs the model, at the end None. `policy`: the live model's,
        by its index; None: the one in force. `scores_top`: score every new token, and so many likeliest beside it;
        `scores_prompt`: the prompt's tokens too. Raises ConfigError for options that make no sense.
        """
        if scores_prompt and prompt.dim() != 1:
            raise ConfigError("a prompt is scored by its token ids; do not embed it before")
        self.prompt, self.sampling, self.tell, self.policy = prompt, sampling, tell, policy
        self.scores_top, self.scores_prompt = scores_top, scores_prompt
        self.sampler = Sampler(sampling)
        self.token_ids: list[int] = []
        self.token_s: list[float] = []  # when each token was there
        self.scores: list[TokenScore] = []  # where wanted: of each token, also of the one that ended the text
        self.prompt_scores: list[TokenScore] = []  # where wanted: of the prompt's tokens from the second on
        self.began_s = 0.0  # when its prefill began
        self.number = -1  # the prompt's in the log
        self.cancelled = False
        self.finish_reason: str | None = None  # length, stop, cancelled or failed; None until its end
        self.error: WdmoeError | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def first_token_s(self) -> float | None:
        """From the beginning of the prefill."""
        return self.token_s[0] - self.began_s if self.token_s else None

    @property
    def step_s(self) -> list[float]:
        """What each further token took."""
        return [later - earlier for earlier, later in itertools.pairwise(self.token_s)]
