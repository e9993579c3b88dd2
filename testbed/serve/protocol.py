"""What a request may say, as OpenAI's API has it. What we cannot do is refused, never ignored."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from testbed.live.sampling import Sampling

MAX_PROMPTS = 64
MAX_TURNS = 1024

Count = Annotated[int, Field(ge=1, le=1_000_000)]
NothingElse = Annotated[float, Field(ge=0, le=0)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=4),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value or []),
]
R = TypeVar("R", bound="AskedFor")


class RequestError(Exception):
    """Answered in the shape that OpenAI's errors have."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def document(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel, extra="forbid"):
    include_usage: bool = False


class AskedFor(BaseModel):
    """What both kinds of request share; `top_k` is this testbed's addition. Temperature 0 is greedy."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Field(max_length=256)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stops = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    n: Literal[1] | None = 1
    presence_penalty: NothingElse | None = 0
    frequency_penalty: NothingElse | None = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    def sampling(self, max_new_tokens: int) -> Sampling:
        temperature = 1.0 if self.temperature is None else self.temperature
        seed = None if self.seed is None else self.seed % 2**63
        if temperature == 0:
            return Sampling(max_new_tokens)
        return Sampling(max_new_tokens, True, temperature, self.top_k, self.top_p or 1.0, seed)


class CompletionRequest(AskedFor):
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Count | None = 16
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False
    logprobs: None = None
    suffix: None = None

    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TextPart(BaseModel, extra="forbid"):
    type: Literal["text"]
    text: str


class Message(BaseModel, extra="forbid"):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_TURNS)]
    name: Annotated[str, Field(max_length=256)] | None = None

    def turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(AskedFor):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: Literal[False] | None = False
    top_logprobs: None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells completions from chat completions on the wire."""

    prefix: str
    kind: str
    chunk_kind: str

    def choice(self, index: int, text: str, finish_reason: str | None, *, chunk: bool, first: bool = False) -> Any:
        choice: dict[str, Any] = {"index": index, "finish_reason": finish_reason, "logprobs": None}
        if self.prefix == "cmpl":
            return choice | {"text": text}
        role = {"role": "assistant"} if first or not chunk else {}
        return choice | {"delta" if chunk else "message": role | {"content": text}}


COMPLETION = Shape("cmpl", "text_completion", "text_completion")
CHAT = Shape("chatcmpl", "chat.completion", "chat.completion.chunk")


def parsed(kind: type[R], body: bytes) -> R:
    """Raises RequestError naming the key that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        key = ".".join(str(part) for part in problem["loc"]) or None
        said = f"{key}: {problem['msg']}" if key else problem["msg"]
        if problem["type"] == "extra_forbidden":
            said = f"{key}: not supported here"
        raise RequestError(400, said, param=key) from None


def event(document: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
