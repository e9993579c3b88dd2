"""One continuation on its way to a client: from tokens of the model's thread to text in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

from testbed.live.engine import CANCELLED, FAILED, STOP, Continuation
from testbed.live.sampling import Sampling
from testbed.live.text import TextStream
from testbed.serve.protocol import RequestError


class Answer:
    """Made in the event loop. Whoever stops listening must `cancel`."""

    def __init__(self, token_ids: Any, sampling: Sampling, stops: Sequence[str], tokenizer: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[int | None] = asyncio.Queue()
        self._text, self._stop = TextStream(tokenizer), StopText(stops)
        self.continuation = Continuation(token_ids, sampling, self._tell)
        self.finish_reason: str | None = None

    def _tell(self, token_id: int | None) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self._heard.put_nowait, token_id)

    def cancel(self) -> None:
        self.continuation.cancelled = True

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes. Raises RequestError where the nodes could not finish it."""
        try:
            while (token_id := await self._heard.get()) is not None:
                if piece := self._stop.add(self._text.add(token_id)):
                    yield piece
                if self._stop.found:
                    self.finish_reason = STOP
                    return
            if piece := self._stop.add(self._text.rest()) + self._stop.rest():
                yield piece
            self.finish_reason = STOP if self._stop.found else self._end()
        finally:
            self.cancel()

    def _end(self) -> str:
        reason = self.continuation.finish_reason or CANCELLED
        if reason == FAILED:
            raise RequestError(503, f"the nodes could not finish it: {self.continuation.error}")
        if reason == CANCELLED:
            raise RequestError(503, "the server is ending")
        return reason

    async def whole(self) -> str:
        return "".join([piece async for piece in self.pieces()])


class StopText:
    """Ends a text before the first of some strings; holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.found = stops, "", False

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
