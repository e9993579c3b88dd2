"""Tokens with their log-probabilities as OpenAI's two kinds of answer show them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from testbed.live.scoring import TokenScore
from testbed.live.text import UNFINISHED, text_of


class ScoredToken(NamedTuple):
    text: str
    offset: int  # characters of the answer before it
    logprob: float | None  # None: nothing was before it
    top: list[tuple[str, float]]  # the likeliest, in its place


class TokenTexts:
    """The text of single tokens, each after the one that was named before."""

    def __init__(self, tokenizer: Any, after: Sequence[int]) -> None:
        self._tokenizer, self._special = tokenizer, set(tokenizer.all_special_ids)
        self._before = list(after)

    def scored(self, token_id: int, score: TokenScore | None, offset: int) -> ScoredToken:
        top = () if score is None else score.top
        token = ScoredToken(
            self._text(token_id),
            offset,
            None if score is None else score.logprob,
            [(self._text(other), logprob) for other, logprob in top],
        )
        self._before = [token_id]
        return token

    def _text(self, token_id: int) -> str:
        if token_id in self._special:
            return str(self._tokenizer.convert_ids_to_tokens(token_id))
        return text_of(self._tokenizer, [token_id], self._before)


def completion_logprobs(tokens: Sequence[ScoredToken], top: int) -> dict[str, Any]:
    """`top` = 0: without alternatives; else the token itself is among them."""
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_alternatives(token) for token in tokens] if top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _alternatives(token: ScoredToken) -> dict[str, float] | None:
    if token.logprob is None:
        return None
    likeliest_last = dict(reversed(token.top))  # of two with one text the likelier
    return {token.text: token.logprob} | likeliest_last


def chat_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    content = [
        _entry(token.text, token.logprob) | {"top_logprobs": [_entry(*other) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float | None) -> dict[str, Any]:
    """Without bytes where the token is a part of a character only."""
    return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}
