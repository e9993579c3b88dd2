"""The HTTP side: OpenAI's completions, chat completions and models, on Starlette. Runs in the event loop's thread."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from testbed.errors import ConfigError
from testbed.live.engine import Engine
from testbed.live.prompting import chat_token_ids, token_ids_of
from testbed.live.sampling import Sampling
from testbed.serve.answer import Answer
from testbed.serve.protocol import (
    CHAT,
    COMPLETION,
    AskedFor,
    ChatRequest,
    CompletionRequest,
    RequestError,
    Shape,
    event,
    parsed,
)

MAX_BODY_BYTES = 2**23


@dataclass(frozen=True, slots=True)
class Serving:
    """What the endpoint needs of the rest."""

    engine: Engine
    tokenizer: Any
    model_name: str
    keys: Sequence[bytes]  # none: nobody is asked for one
    max_waiting: int  # requests beyond the batch; more are sent away
    emulated: bool
    ending: Callable[[], bool]
    nodes_available: Callable[[], int]


def build_app(serving: Serving) -> Starlette:
    api = Api(serving)
    routes = [
        Route("/v1/completions", api.completions, methods=["POST"]),
        Route("/v1/chat/completions", api.chat_completions, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.models),
        Route("/health", api.health),
    ]
    return Starlette(routes=routes, exception_handlers={RequestError: _refused, HTTPException: _not_found})


async def _refused(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.document(), error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return await _refused(request, RequestError(status, f"{request.method} {request.url.path}: nothing is served here"))


class Api:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._began = int(time.time())

    async def completions(self, request: Request) -> Response:
        asked = parsed(CompletionRequest, await self._body(request))
        sampling = asked.sampling(asked.max_tokens or 16)
        prompts = [self._prompt(prompt) for prompt in asked.prompts()]
        return await self._respond(request, COMPLETION, asked, prompts, sampling)

    async def chat_completions(self, request: Request) -> Response:
        asked = parsed(ChatRequest, await self._body(request))
        try:
            prompt = chat_token_ids(self._serving.tokenizer, [message.turn() for message in asked.messages])
        except ConfigError as error:
            raise RequestError(400, str(error), param="messages") from error
        room = (self._serving.engine.context_tokens or 2**20) - len(prompt)
        sampling = asked.sampling(asked.max_completion_tokens or asked.max_tokens or max(1, room))
        return await self._respond(request, CHAT, asked, [prompt], sampling)

    async def models(self, request: Request) -> Response:
        self._check_key(request)
        name = self._serving.model_name
        model = {"id": name, "object": "model", "created": self._began, "owned_by": "wdmoe-testbed"}
        if "model" not in request.path_params:
            return JSONResponse({"object": "list", "data": [model]})
        self._check_model(request.path_params["model"])
        return JSONResponse(model)

    async def health(self, _request: Request) -> Response:
        """Without a key: whether somebody is there to compute."""
        serving = self._serving
        nodes = serving.nodes_available()
        ok = nodes > 0 and not serving.ending()
        return JSONResponse({"ok": ok, "nodes": nodes, "waiting": serving.engine.waiting}, 200 if ok else 503)

    async def _body(self, request: Request) -> bytes:
        """Checked for who asks, and never larger than it may be."""
        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RequestError(415, "the body must be JSON: send the header Content-Type: application/json")
        body = bytearray()
        try:
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise RequestError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        except ClientDisconnect:
            raise RequestError(400, "the body is not whole") from None
        return bytes(body)

    def _check_key(self, request: Request) -> None:
        keys = self._serving.keys
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        known = any(hmac.compare_digest(given.strip().encode(), key) for key in keys)
        if keys and not (known and scheme.lower() == "bearer"):
            raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")

    def _check_model(self, name: str) -> None:
        if name != self._serving.model_name:
            said = f"no model {name!r} here; {self._serving.model_name!r} is served"
            raise RequestError(404, said, param="model", code="model_not_found")

    def _prompt(self, prompt: str | list[int]) -> Any:
        if isinstance(prompt, list):
            largest = len(self._serving.tokenizer) - 1
            if max(prompt) > largest:
                raise RequestError(400, f"prompt: token ids go up to {largest}", param="prompt")
            return torch.tensor(prompt, dtype=torch.long)
        try:
            return token_ids_of(self._serving.tokenizer, prompt)
        except ConfigError as error:
            raise RequestError(400, str(error), param="prompt") from error

    async def _respond(
        self, request: Request, shape: Shape, asked: AskedFor, prompts: Sequence[Any], sampling: Sampling
    ) -> Response:
        self._check_model(asked.model)
        answers = self._submit(prompts, sampling, asked.stop)
        base = {
            "id": f"{shape.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._serving.model_name,
        }
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            stream = self._stream(shape, base | {"object": shape.chunk_kind}, answers, usage=usage)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        texts = await _unless_gone(request, answers)
        choices = [
            shape.choice(index, text, answer.finish_reason, chunk=False)
            for index, (text, answer) in enumerate(zip(texts, answers, strict=True))
        ]
        return JSONResponse(base | {"object": shape.kind, "choices": choices} | self._figures(answers))

    def _submit(self, prompts: Sequence[Any], sampling: Sampling, stops: Sequence[str]) -> list[Answer]:
        engine = self._serving.engine
        if self._serving.ending():
            raise RequestError(503, "the server is ending")
        if engine.waiting + len(prompts) > self._serving.max_waiting:
            raise RequestError(429, f"{engine.waiting} requests wait already; try again later")
        try:
            answers = [Answer(prompt, sampling, stops, self._serving.tokenizer) for prompt in prompts]
            for answer in answers:
                engine.check(answer.continuation)
        except ConfigError as error:
            raise RequestError(400, str(error), code="context_length_exceeded") from error
        for answer in answers:
            engine.submit(answer.continuation)
        return answers

    async def _stream(
        self, shape: Shape, base: dict[str, Any], answers: Sequence[Answer], *, usage: bool
    ) -> AsyncIterator[str]:
        nothing_yet = {"usage": None} if usage else {}
        try:
            for index, answer in enumerate(answers):  # all are under way together; their texts come one after the other
                first = True
                async for piece in answer.pieces():
                    choice = shape.choice(index, piece, None, chunk=True, first=first)
                    first = False
                    yield event(base | {"choices": [choice]} | nothing_yet)
                last = shape.choice(index, "", answer.finish_reason, chunk=True, first=first)
                yield event(base | {"choices": [last]} | nothing_yet)
            if usage:
                yield event(base | {"choices": []} | self._figures(answers))
            yield "data: [DONE]\n\n"
        except RequestError as error:  # the status is on its way already
            yield event(error.document())
        finally:
            for answer in answers:
                answer.cancel()

    def _figures(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What was used, as OpenAI says it, and how long it took, in the run's time."""
        continuations = [answer.continuation for answer in answers]
        sent, made = sum(c.prompt_tokens for c in continuations), sum(len(c.token_ids) for c in continuations)
        times = [{"prompt": c.number, "first_token_s": c.first_token_s, "token_s": c.step_s} for c in continuations]
        return {
            "usage": {"prompt_tokens": sent, "completion_tokens": made, "total_tokens": sent + made},
            "testbed": {"emulated": self._serving.emulated, "answers": times},
        }


async def _unless_gone(request: Request, answers: Sequence[Answer]) -> list[str]:
    """The whole texts; whoever hangs up is no longer computed for."""
    texts = asyncio.create_task(_whole(answers))
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait((texts, gone), return_when=asyncio.FIRST_COMPLETED)
        if not texts.done():
            raise RequestError(499, "the client hung up")
        return texts.result()
    finally:
        for task in (texts, gone):
            task.cancel()
        for answer in answers:
            answer.cancel()


async def _whole(answers: Sequence[Answer]) -> list[str]:
    return list(await asyncio.gather(*(answer.whole() for answer in answers)))


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
