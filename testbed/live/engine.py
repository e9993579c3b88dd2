"""Continuations of many prompts at once: whoever comes joins the batch between two tokens, whoever is done leaves it.

All tokens of a step travel to the nodes in one round per layer, so that requests share what a round costs.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from testbed.errors import ConfigError, WdmoeError
from testbed.live.batch import Batch
from testbed.live.model import LiveModel
from testbed.live.sampling import Sampler, Sampling

CANCELLED, LENGTH, STOP, FAILED = "cancelled", "length", "stop", "failed"
Tell = Callable[[int | None], None]


class Continuation:
    """One prompt and what was added to it. Times are readings of the live model's clock."""

    def __init__(self, prompt: Any, sampling: Sampling, tell: Tell = lambda _token_id: None) -> None:
        """`prompt`: token ids (T,), or embeddings (T, D) where the ids stay with the user.

        `tell` hears of every token from the thread that runs the model, at the end None. Raises ConfigError for
        sampling options that make no sense.
        """
        self.prompt, self.sampling, self.tell = prompt, sampling, tell
        self.sampler = Sampler(sampling)
        self.token_ids: list[int] = []
        self.token_s: list[float] = []  # when each token was there
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


class Engine:
    """Belongs to its live model's thread; `submit`, `check`, `waiting` and a continuation's `cancelled` to all."""

    def __init__(self, live: LiveModel, max_batch: int) -> None:
        """Raises ConfigError for a model whose cache cannot be put together from several prompts."""
        self._live, self._max_batch = live, max_batch
        self._waiting: deque[Continuation] = deque()
        self._running: list[Continuation] = []
        self._somebody_came = threading.Event()
        self._batch = Batch(live.model)
        end = live.model.generation_config.eos_token_id
        self._end_ids = set(end) if isinstance(end, list) else {end}
        self.context_tokens: int | None = getattr(live.model.config, "max_position_embeddings", None)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, continuation: Continuation) -> None:
        """Let it join as soon as there is room. Raises ConfigError as `check` does."""
        self.check(continuation)
        self._waiting.append(continuation)
        self._somebody_came.set()

    def wait(self, timeout_s: float) -> None:
        """Until somebody is submitted, or not."""
        self._somebody_came.wait(timeout_s)
        self._somebody_came.clear()

    def check(self, continuation: Continuation) -> None:
        """Raises ConfigError for one that the model has no room for."""
        asked = continuation.prompt_tokens + continuation.sampling.max_new_tokens
        if continuation.prompt_tokens == 0:
            raise ConfigError("the prompt has no token; write something to continue")
        if self.context_tokens is not None and asked > self.context_tokens:
            raise ConfigError(
                f"the model has room for {self.context_tokens} tokens; the prompt's {continuation.prompt_tokens} and "
                f"max_new_tokens = {continuation.sampling.max_new_tokens} are more: shorten one of them"
            )

    def run(self) -> None:
        """Until every continuation is done. Raises WdmoeError where a round failed."""
        while self.step():
            pass

    @torch.inference_mode()
    def step(self) -> bool:
        """One more token for everybody, or the first one of newcomers. False where there was nothing to do.

        Raises WdmoeError where a round failed; all continuations under way have then ended with that error.
        """
        self._leave([c for c in self._running if c.cancelled], CANCELLED)
        newcomers = self._newcomers()
        if not newcomers and not self._running:
            return False
        try:
            if newcomers:
                self._take_in(newcomers)
            else:
                last_B = [continuation.token_ids[-1] for continuation in self._running]
                self._choose(self._running, self._batch.decode(last_B))
        except WdmoeError as error:
            unfinished = [c for c in {*self._running, *newcomers} if c.finish_reason is None]
            for continuation in unfinished:
                continuation.error = error
            self._end(unfinished, FAILED)
            self._running, self._batch = [], Batch(self._live.model)
            raise
        return True

    def close(self) -> None:
        """Cancel whatever is under way or waits."""
        self._end([*self._running, *self._waiting], CANCELLED)
        self._running, self._batch = [], Batch(self._live.model)
        self._waiting.clear()

    def _newcomers(self) -> list[Continuation]:
        found: list[Continuation] = []
        while self._waiting and len(self._running) + len(found) < self._max_batch:
            continuation = self._waiting.popleft()
            if continuation.cancelled:
                self._end([continuation], CANCELLED)
            else:
                found.append(continuation)
        return found

    def _take_in(self, newcomers: list[Continuation]) -> None:
        """Prefill. Whoever comes together is one prompt of the log, and meets one draw of an emulated channel."""
        number, began_s = self._live.begin_prompt(continued=True), self._live.clock.now_s()
        for continuation in newcomers:
            continuation.number, continuation.began_s = number, began_s
        logits_BV = self._batch.join([continuation.prompt for continuation in newcomers])
        self._running += newcomers
        self._choose(newcomers, logits_BV)

    def _choose(self, continuations: list[Continuation], logits_BV: Any) -> None:
        now_s = self._live.clock.now_s()
        stopped, at_length = [], []
        for continuation, logits_V in zip(continuations, logits_BV, strict=True):
            token_id = continuation.sampler.next_token(logits_V)
            continuation.token_s.append(now_s)
            if token_id in self._end_ids:
                stopped.append(continuation)
                continue
            continuation.token_ids.append(token_id)
            continuation.tell(token_id)
            if len(continuation.token_ids) == continuation.sampling.max_new_tokens:
                at_length.append(continuation)
        self._leave(stopped, STOP)
        self._leave(at_length, LENGTH)

    def _leave(self, done: list[Continuation], reason: str) -> None:
        if not done:
            return
        stay = [row for row, continuation in enumerate(self._running) if continuation not in done]
        self._batch.keep(stay)
        self._running = [self._running[row] for row in stay]
        if not self._running:
            self._live.settle()
        self._end(done, reason)

    def _end(self, done: list[Continuation], reason: str) -> None:
        for continuation in done:
            continuation.finish_reason = reason
            self._live.event(
                "generated",
                policy=self._live.policy,
                prompt=continuation.number,
                prompt_tokens=continuation.prompt_tokens,
                tokens=len(continuation.token_ids),
                token_s=continuation.step_s,
                finish_reason=reason,
            )
            continuation.tell(None)
