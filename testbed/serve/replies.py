"""Answers as clients get them: whole, or as a stream of server-sent events, in the shapes of OpenAI's API."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from testbed.serve.answer import Answer, Piece
from testbed.serve.protocol import RequestError
from testbed.serve.token_texts import chat_logprobs, completion_logprobs


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells completions from chat completions on the wire."""

    prefix: str
    kind: str
    chunk_kind: str
    said: Callable[[Piece, int | None, bool], dict[str, Any]]  # a text, with alternatives to each token, in a chunk?
    opening: dict[str, Any]  # what a stream says at once


def _completion(piece: Piece, top: int | None, _chunk: bool) -> dict[str, Any]:
    return {"text": piece.text, "logprobs": None if top is None else completion_logprobs(piece.tokens, top)}


def _chat(piece: Piece, top: int | None, chunk: bool) -> dict[str, Any]:
    said = {"delta": {"content": piece.text}} if chunk else {"message": {"role": "assistant", "content": piece.text}}
    return {**said, "logprobs": None if top is None else chat_logprobs(piece.tokens)}


COMPLETION = Shape("cmpl", "text_completion", "text_completion", _completion, {})
CHAT = Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    _chat,
    {"delta": {"role": "assistant", "content": ""}, "logprobs": None},
)


class Reply:
    """The answers to one request: to its first prompt `n`, to the next `n`, and so on."""

    def __init__(
        self, shape: Shape, answers: Sequence[Answer], n: int, scores_top: int | None, model: str, facts: dict[str, Any]
    ) -> None:
        """`facts` are this testbed's addition to OpenAI's figures."""
        self._shape, self._answers, self._n, self._scores_top, self._facts = shape, answers, n, scores_top, facts
        self._base = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self, request: Request) -> Response:
        """Raises RequestError where it could not be finished, or the client hung up."""
        pieces = await _unless_gone(request, self._answers)
        choices = [
            self._choice(index, self._shape.said(piece, self._scores_top, False), answer.finish_reason)
            for index, (piece, answer) in enumerate(zip(pieces, self._answers, strict=True))
        ]
        return JSONResponse(self._base | {"object": self._shape.kind, "choices": choices} | self._figures())

    def stream(self, *, usage: bool) -> Response:
        """`usage`: end with what was used."""
        return _Stream(self._events(usage=usage), self._answers)

    async def _events(self, *, usage: bool) -> AsyncIterator[str]:
        base = self._base | {"object": self._shape.chunk_kind} | ({"usage": None} if usage else {})
        try:
            for index in range(len(self._answers) if self._shape.opening else 0):
                yield _event(base | {"choices": [self._choice(index, self._shape.opening, None)]})
            async for index, piece in _as_they_come(self._answers):
                said = self._shape.said(piece or Piece("", []), self._scores_top if piece else None, True)
                reason = None if piece else self._answers[index].finish_reason
                yield _event(base | {"choices": [self._choice(index, said, reason)]})
            if usage:
                yield _event(base | {"choices": []} | self._figures())
            yield "data: [DONE]\n\n"
        except RequestError as error:  # the status is on its way already
            yield _event(error.document())

    @staticmethod
    def _choice(index: int, said: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
        return {"index": index, "finish_reason": finish_reason, **said}

    def _figures(self) -> dict[str, Any]:
        """What was used, as OpenAI says it, and how long it took, in the run's time."""
        continuations = [answer.continuation for answer in self._answers]
        sent = sum(continuation.prompt_tokens for continuation in continuations[:: self._n])
        made = sum(len(answer.token_ids) for answer in self._answers)
        times = [{"prompt": c.number, "first_token_s": c.first_token_s, "token_s": c.step_s} for c in continuations]
        return {
            "usage": {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made},
            "testbed": {**self._facts, "answers": times},
        }


async def _as_they_come(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Piece | None]]:
    """Pieces with the index of their answer, and None for each after its last one. Raises RequestError."""
    said: asyncio.Queue[tuple[int, Piece | RequestError | None]] = asyncio.Queue()

    async def listen(index: int, answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                said.put_nowait((index, piece))
            said.put_nowait((index, None))
        except RequestError as error:
            said.put_nowait((index, error))

    listeners = [asyncio.create_task(listen(index, answer)) for index, answer in enumerate(answers)]
    try:
        unfinished = len(answers)
        while unfinished:
            index, piece = await said.get()
            if isinstance(piece, RequestError):
                raise piece
            unfinished -= piece is None
            yield index, piece
    finally:
        for listener in listeners:
            listener.cancel()


class _Stream(StreamingResponse):
    """However it ends, and where it never began, nothing goes on being computed for it."""

    def __init__(self, events: AsyncIterator[str], answers: Sequence[Answer]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel(self._answers)


def _cancel(answers: Sequence[Answer]) -> None:
    for answer in answers:
        answer.cancel()


def _event(document: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


async def _unless_gone(request: Request, answers: Sequence[Answer]) -> list[Piece]:
    """The whole answers; whoever hangs up is no longer computed for."""
    pieces = asyncio.create_task(_whole(answers))
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait((pieces, gone), return_when=asyncio.FIRST_COMPLETED)
        if not pieces.done():
            raise RequestError(499, "the client hung up")
        return pieces.result()
    finally:
        for task in (pieces, gone):
            task.cancel()
        _cancel(answers)


async def _whole(answers: Sequence[Answer]) -> list[Piece]:
    return list(await asyncio.gather(*(answer.whole() for answer in answers)))


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
