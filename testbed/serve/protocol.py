"""What a request may say, as OpenAI's API has it. What we cannot do is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from testbed.live.sampling import Sampling

MAX_PROMPTS = 64
MAX_TURNS = 1024
MAX_CHOICES = 16
# what clients send although it changes nothing is taken as long as it does not
LEFT_OUT = ("best_of", "frequency_penalty", "logit_bias", "presence_penalty", "response_format", "suffix", "tools")

Count = Annotated[int, Field(ge=1, le=1_000_000)]
NothingElse = Annotated[float, Field(ge=0, le=0)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=1_000_000)]
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=16),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value or []),
]
Alternatives = Annotated[int, Field(ge=0, le=20)]
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
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    presence_penalty: NothingElse | None = 0
    frequency_penalty: NothingElse | None = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def scores_top(self) -> int | None:
        """Score the tokens, and so many likeliest ones beside each; None: not asked for."""
        raise NotImplementedError

    def sampling(self, max_new_tokens: int, index: int) -> Sampling:
        """Of the answer with this index among the `n`: each draws by itself, repeatably with a seed."""
        temperature = 1.0 if self.temperature is None else self.temperature
        seed = None if self.seed is None else (self.seed + index) % 2**63
        if temperature == 0:
            return Sampling(max_new_tokens)
        return Sampling(max_new_tokens, True, temperature, self.top_k, self.top_p or 1.0, seed)


class CompletionRequest(AskedFor):
    prompt: str | Ids | Annotated[list[str] | list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    max_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = 16
    best_of: Literal[1] | None = 1
    echo: bool | None = False
    logprobs: Alternatives | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _something_is_asked_for(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 is for a prompt that is to be scored; add echo, or ask for a token")
        return self

    @property
    def scores_top(self) -> int | None:
        return self.logprobs

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

    def turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(BaseModel, extra="forbid"):
    type: Literal["text"]


class ChatRequest(AskedFor):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Alternatives | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _alternatives_are_beside_something(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: without effect while logprobs is not true")
        return self

    @property
    def scores_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parsed(kind: type[R], body: bytes) -> R:
    """Raises RequestError naming the key that is wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        keys = [str(part) for part in problem["loc"]]
        if problem["type"] == "value_error":  # said by a class here, beginning with the key
            said = str(problem["ctx"]["error"])
            raise RequestError(400, said, param=said.partition(":")[0]) from None
        if not keys:
            raise RequestError(400, problem["msg"]) from None
        if problem["type"] == "extra_forbidden" or keys[0] in LEFT_OUT:
            raise RequestError(400, f"{'.'.join(keys)}: not supported here; leave it out", param=keys[0]) from None
        if keys[0] == "prompt" and problem["type"] != "missing":  # one of four kinds, pydantic tells of each
            said = f"must be text, token ids, or a list of at most {MAX_PROMPTS} of either"
            raise RequestError(400, f"prompt: {said}", param="prompt") from None
        raise RequestError(400, f"{'.'.join(keys)}: {problem['msg']}", param=keys[0]) from None
