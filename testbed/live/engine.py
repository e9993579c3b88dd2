"""Continuations of many prompts at once: whoever comes joins the batch between two tokens, whoever is done leaves it.

All tokens of a step travel to the nodes in one round per layer, so that requests share what a round costs. A round has
one policy: whoever wants another one waits, in the order of arrival, until those under way are done.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch

from testbed.errors import ConfigError, WdmoeError
from testbed.live.batch import Batch
from testbed.live.continuation import CANCELLED, FAILED, LENGTH, STOP, Continuation
from testbed.live.model import LiveModel
from testbed.live.scoring import token_scores

MAX_LOGITS = 2**29  # kept at once where prompts are scored: 2 GiB in fp32


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
        self.vocabulary: int = live.model.config.get_text_config().vocab_size

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, continuation: Continuation) -> None:
        """Let it join as soon as there is room. Raises ConfigError as `check` does."""
        self.check(continuation)
        if continuation.policy is None:
            continuation.policy = self._live.policy
        self._waiting.append(continuation)
        self._somebody_came.set()

    def wait(self, timeout_s: float) -> None:
        """Until somebody is submitted, or not."""
        self._somebody_came.wait(timeout_s)
        self._somebody_came.clear()

    def check(self, continuation: Continuation) -> None:
        """Raises ConfigError for one that the model, or this machine's memory, has no room for."""
        asked = continuation.prompt_tokens + continuation.sampling.max_new_tokens
        if continuation.prompt_tokens == 0:
            raise ConfigError("the prompt has no token; write something to continue")
        if self.context_tokens is not None and asked > self.context_tokens:
            raise ConfigError(
                f"the model has room for {self.context_tokens} tokens; the prompt's {continuation.prompt_tokens} and "
                f"max_new_tokens = {continuation.sampling.max_new_tokens} are more: shorten one of them"
            )
        if continuation.scores_prompt and continuation.prompt_tokens * self.vocabulary > MAX_LOGITS:
            raise ConfigError(
                f"the probabilities of a prompt of {continuation.prompt_tokens} tokens are too many at once; "
                f"have at most {MAX_LOGITS // self.vocabulary} scored"
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
            if self._waiting[0].cancelled:
                self._end([self._waiting.popleft()], CANCELLED)
            elif self._may_join(self._waiting[0], found):
                found.append(self._waiting.popleft())
            else:
                break
        return found

    def _may_join(self, continuation: Continuation, newcomers: list[Continuation]) -> bool:
        """Those under way have the same policy, and the logits of whoever is prefilled together are not too many."""
        if any(other.policy != continuation.policy for other in (*self._running, *newcomers)):
            return False
        together = [*newcomers, continuation]
        logits = len(together) * max(c.prompt_tokens for c in together) * self.vocabulary
        return not newcomers or logits <= MAX_LOGITS or not any(c.scores_prompt for c in together)

    def _take_in(self, newcomers: list[Continuation]) -> None:
        """Prefill. Whoever comes together is one prompt of the log, and meets one draw of an emulated channel."""
        policy = newcomers[0].policy
        if policy is not None and policy != self._live.policy:
            self._live.use_policy(policy)
        number, began_s = self._live.begin_prompt(), self._live.clock.now_s()
        for continuation in newcomers:
            continuation.number, continuation.began_s = number, began_s
        scored = any(continuation.scores_prompt for continuation in newcomers)
        logits_BSV = self._batch.join([continuation.prompt for continuation in newcomers], every_token=scored)
        for continuation, logits_SV in zip(newcomers, logits_BSV, strict=True):
            if continuation.scores_prompt:
                ids, top = continuation.prompt.tolist(), continuation.scores_top or 0
                continuation.prompt_scores = token_scores(logits_SV[-len(ids) : -1], ids[1:], top)
        self._running += newcomers
        self._choose(newcomers, logits_BSV[:, -1])

    def _choose(self, continuations: list[Continuation], logits_BV: Any) -> None:
        logits_BV = logits_BV.cpu()  # from a GPU in one copy, and when it is there the step is done
        now_s = self._live.clock.now_s()
        stopped, at_length = [], []
        for continuation, logits_V in zip(continuations, logits_BV, strict=True):
            if continuation.sampling.max_new_tokens == 0:  # it was only to be scored
                at_length.append(continuation)
                continue
            token_id = continuation.sampler.next_token(logits_V)
            continuation.token_s.append(now_s)
            if continuation.scores_top is not None:
                continuation.scores += token_scores(logits_V[None], [token_id], continuation.scores_top)
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
                policy=continuation.policy,
                prompt=continuation.number,
                prompt_tokens=continuation.prompt_tokens,
                tokens=len(continuation.token_ids),
                token_s=continuation.step_s,
                finish_reason=reason,
            )
            continuation.tell(None)
