"""One continuation on its way to a client: from tokens of the model's thread to text in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from testbed.live.continuation import CANCELLED, FAILED, STOP, Continuation
from testbed.live.sampling import Sampling
from testbed.live.text import TextStream
from testbed.serve.protocol import RequestError
from testbed.serve.token_texts import ScoredToken, TokenTexts


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request wants of each of its answers."""

    sampling: Sampling
    stops: Sequence[str]
    policy: int
    echo: bool  # begin with the prompt
    scores_top: int | None  # score every token, and so many likeliest ones beside it


class Piece(NamedTuple):
    text: str
    tokens: list[ScoredToken]  # where wanted: those that begin in this text


class Answer:
    """Made in the event loop. Whoever stops listening must `cancel`."""

    def __init__(self, prompt_ids: Any, asked: Asked, tokenizer: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[int | None] = asyncio.Queue()
        self._asked, self._prompt_ids = asked, prompt_ids.tolist()
        self._text = TextStream(tokenizer, after=() if asked.echo else self._prompt_ids)
        self._stop = StopText(asked.stops)
        self._names = TokenTexts(tokenizer, () if asked.echo else self._prompt_ids[-1:])
        self._tokens: list[ScoredToken] = []  # not yet handed out: their text is held back
        self._said = 0  # characters
        scores_prompt = asked.echo and asked.scores_top is not None
        self.continuation = Continuation(
            prompt_ids,
            asked.sampling,
            self._tell,
            policy=asked.policy,
            scores_top=asked.scores_top,
            scores_prompt=scores_prompt,
        )
        self.token_ids: list[int] = []  # heard
        self.finish_reason: str | None = None

    def _tell(self, token_id: int | None) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._heard.put_nowait, token_id)

    def cancel(self) -> None:
        self.continuation.cancelled = True

    async def whole(self) -> Piece:
        pieces = [piece async for piece in self.pieces()]
        return Piece("".join(piece.text for piece in pieces), [token for piece in pieces for token in piece.tokens])

    async def pieces(self) -> AsyncIterator[Piece]:
        """The text as it comes. Raises RequestError where the nodes could not finish it."""
        try:
            token_id = await self._heard.get()
            if token_id is None:
                self._raise_if_broken_off()
            if self._asked.echo:
                yield await asyncio.to_thread(self._prompt)  # many tokens may have to be named
            while token_id is not None:
                if (piece := self._token(token_id)) is not None:
                    yield piece
                if self._stop.found:
                    self.finish_reason = STOP
                    return
                token_id = await self._heard.get()
            self._raise_if_broken_off()
            if (piece := self._rest()) is not None:
                yield piece
            self.finish_reason = STOP if self._stop.found else self.continuation.finish_reason
        finally:
            self.cancel()

    def _raise_if_broken_off(self) -> None:
        if self.continuation.finish_reason == FAILED:
            raise RequestError(503, f"the nodes could not finish it: {self.continuation.error}")
        if self.continuation.finish_reason == CANCELLED:
            raise RequestError(503, "the server is ending")

    def _prompt(self) -> Piece:
        text = ""
        scores = [None, *self.continuation.prompt_scores]  # nothing stands before the first token
        for index, token_id in enumerate(self._prompt_ids):
            if self._asked.scores_top is not None:
                self._tokens.append(self._names.scored(token_id, scores[index], len(text)))
            text += self._text.add(token_id)
        return self._piece(text)

    def _token(self, token_id: int) -> Piece | None:
        """What may be said after this one; None: nothing yet."""
        if self._asked.scores_top is not None:
            score = self.continuation.scores[len(self.token_ids)]
            self._tokens.append(self._names.scored(token_id, score, self._said + self._stop.held))
        self.token_ids.append(token_id)
        text = self._stop.add(self._text.add(token_id))
        return self._piece(text) if text else None

    def _rest(self) -> Piece | None:
        """What was held back when the last token had come; the token that ended the text is scored too."""
        text = self._stop.add(self._text.rest()) + self._stop.rest()
        piece = self._piece(text)
        if self._stop.found:
            return piece if text else None
        ending = self.continuation.scores[len(self.token_ids) :]
        last = self._tokens + [self._names.scored(score.token_id, score, self._said) for score in ending]
        return Piece(text, piece.tokens + last) if text or last else None

    def _piece(self, text: str) -> Piece:
        self._said += len(text)
        begun = [token for token in self._tokens if token.offset < self._said]
        self._tokens = self._tokens[len(begun) :]
        return Piece(text, begun)


class StopText:
    """Ends a text before the first of some strings; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = stops, "", False

    @property
    def held(self) -> int:
        """Characters that are held back."""
        return len(self._held)

    def add(self, text: str) -> str:
        """What of the text may be said."""
        held = self._held + text
        ends = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if self.found or ends:
            self._held = ""
            before = "" if self.found else held[: min(ends)]
            self.found = True
            return before
        keep = max((n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def rest(self) -> str:
        """What was held back and turned out to be no stop."""
        held, self._held = self._held, ""
        return held
