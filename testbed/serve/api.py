"""The HTTP side: OpenAI's completions, chat completions and models, on Starlette. Runs in the event loop's thread."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from testbed.errors import ConfigError
from testbed.live.engine import Engine
from testbed.live.prompting import chat_token_ids, token_ids_of
from testbed.serve.answer import Answer, Asked
from testbed.serve.protocol import AskedFor, ChatRequest, CompletionRequest, RequestError, parsed
from testbed.serve.replies import CHAT, COMPLETION, Reply, Shape

MAX_BODY_BYTES = 2**23


@dataclass(frozen=True, slots=True)
class Serving:
    """What the endpoint needs of the rest."""

    engine: Engine
    tokenizer: Any
    models: Mapping[str, int]  # name -> the policy under which it answers
    policy_labels: Sequence[str]
    keys: Sequence[bytes]  # none: nobody is asked for one
    max_waiting: int  # continuations beyond the batch; more are sent away
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
    return Starlette(
        routes=routes, exception_handlers={RequestError: _refused, HTTPException: _not_found, Exception: _broken}
    )


async def _refused(_request: Request, error: Exception) -> Response:
    if not isinstance(error, RequestError):
        raise error
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(error.document(), error.status, headers)


async def _not_found(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return await _refused(request, RequestError(status, f"{request.method} {request.url.path}: nothing is served here"))


async def _broken(request: Request, error: Exception) -> Response:
    """An error of ours, whose trace is on the server's stderr."""
    return await _refused(request, RequestError(500, f"the server failed: {type(error).__name__}"))


class Api:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving
        self._began = int(time.time())

    async def completions(self, request: Request) -> Response:
        asked = parsed(CompletionRequest, await self._body(request))
        prompts = [self._prompt(prompt) for prompt in asked.prompts()]
        max_tokens = 16 if asked.max_tokens is None else asked.max_tokens
        return await self._respond(request, COMPLETION, asked, prompts, max_tokens, echo=bool(asked.echo))

    async def chat_completions(self, request: Request) -> Response:
        asked = parsed(ChatRequest, await self._body(request))
        try:
            prompt = chat_token_ids(self._serving.tokenizer, [message.turn() for message in asked.messages])
        except ConfigError as error:
            raise RequestError(400, str(error), param="messages") from error
        room = (self._serving.engine.context_tokens or 2**20) - len(prompt)
        max_tokens = asked.max_completion_tokens or asked.max_tokens or max(1, room)
        return await self._respond(request, CHAT, asked, [prompt], max_tokens, echo=False)

    async def models(self, request: Request) -> Response:
        """The model under the first policy has its bare name; under each one, a name that says which."""
        self._check_key(request)
        if "model" in request.path_params:
            name = request.path_params["model"]
            return JSONResponse(self._model(name, self._policy(name)))
        models = [self._model(name, policy) for name, policy in self._serving.models.items()]
        return JSONResponse({"object": "list", "data": models})

    def _model(self, name: str, policy: int) -> dict[str, Any]:
        label = self._serving.policy_labels[policy]
        model = {"id": name, "object": "model", "created": self._began, "owned_by": "wdmoe-testbed"}
        return model | {"testbed": {"policy": label}}

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

    def _policy(self, model: str) -> int:
        if model not in self._serving.models:
            said = f"no model {model!r} here; served: {', '.join(self._serving.models)}"
            raise RequestError(404, said, param="model", code="model_not_found")
        return self._serving.models[model]

    def _prompt(self, prompt: str | list[int]) -> Any:
        if isinstance(prompt, list):
            largest = min(len(self._serving.tokenizer), self._serving.engine.vocabulary) - 1
            if max(prompt) > largest:
                raise RequestError(400, f"prompt: token ids go up to {largest}", param="prompt")
            return torch.tensor(prompt, dtype=torch.long)
        try:
            return token_ids_of(self._serving.tokenizer, prompt)
        except ConfigError as error:
            raise RequestError(400, str(error), param="prompt") from error

    async def _respond(
        self, request: Request, shape: Shape, asked: AskedFor, prompts: Sequence[Any], max_tokens: int, *, echo: bool
    ) -> Response:
        policy, n = self._policy(asked.model), asked.n or 1
        answers = []
        for prompt_ids in prompts:
            for index in range(n):
                sampling = asked.sampling(max_tokens, index)
                each = Asked(sampling, asked.stop, policy, echo, asked.scores_top)
                answers.append(Answer(prompt_ids, each, self._serving.tokenizer))
        self._submit(answers)
        facts = {"emulated": self._serving.emulated, "policy": self._serving.policy_labels[policy]}
        reply = Reply(shape, answers, n, asked.scores_top, asked.model, facts)
        if asked.stream:
            return reply.stream(usage=asked.stream_options is not None and asked.stream_options.include_usage)
        return await reply.whole(request)

    def _submit(self, answers: Sequence[Answer]) -> None:
        """All of them or none."""
        engine, most = self._serving.engine, self._serving.max_waiting
        if self._serving.ending():
            raise RequestError(503, "the server is ending")
        if len(answers) > most:
            raise RequestError(400, f"{len(answers)} continuations are asked for at once; at most {most} may wait here")
        if engine.waiting + len(answers) > most:
            raise RequestError(429, f"{engine.waiting} requests wait already; try again later")
        try:
            for answer in answers:
                engine.check(answer.continuation)
        except ConfigError as error:
            raise RequestError(400, str(error), code="context_length_exceeded") from error
        for answer in answers:
            engine.submit(answer.continuation)
