"""What a client is told of a continuation: its text in pieces, and each token where it stands in that text."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("starlette")

from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from testbed.config.sections import ModelSection
from testbed.live.continuation import FAILED, LENGTH, STOP
from testbed.live.sampling import Sampling
from testbed.live.scoring import TokenScore
from testbed.serve.answer import Answer, Asked, Piece
from testbed.serve.protocol import RequestError
from testbed.serve.token_texts import chat_logprobs, completion_logprobs

pytestmark = [pytest.mark.torch]

TOKENIZER = AutoTokenizer.from_pretrained(ModelSection().folder)
END = TOKENIZER.eos_token_id
TEXTS = st.text("ab ()\näß漢🙂", max_size=12)


def score(token_id: int) -> TokenScore:
    return TokenScore(token_id, -0.5, ((7, -0.25), (token_id, -0.5)))


def answered(
    prompt: str, text: str, *, stops: Sequence[str] = (), echo: bool = False, top: int | None = 2, ended: bool = False
) -> tuple[Piece, str | None]:
    """What is said when the model's thread tells of the text's tokens; `ended`: by one that means the end."""
    prompt_ids, token_ids = TOKENIZER(prompt)["input_ids"], TOKENIZER(text)["input_ids"]

    async def said() -> tuple[Piece, str | None]:
        answer = Answer(torch.tensor(prompt_ids), Asked(Sampling(), stops, 0, echo, top), TOKENIZER)
        continuation = answer.continuation
        continuation.prompt_scores = [score(token_id) for token_id in prompt_ids[1:]]
        continuation.scores = [score(token_id) for token_id in [*token_ids, *([END] if ended else [])]]
        continuation.finish_reason = STOP if ended else LENGTH
        for token_id in [*token_ids, None]:
            continuation.tell(token_id)
        return await answer.whole(), answer.finish_reason

    return asyncio.run(said())


@given(TEXTS, TEXTS, st.booleans(), st.booleans())
def test_every_token_is_told_once_and_in_its_place(prompt: str, text: str, echo: bool, ended: bool) -> None:
    prompt = f"x{prompt}"  # one has to be there
    piece, reason = answered(prompt, text, echo=echo, ended=ended)
    assert piece.text == (prompt if echo else "") + text
    assert reason == (STOP if ended else LENGTH)
    told = ((TOKENIZER(prompt)["input_ids"]) if echo else []) + TOKENIZER(text)["input_ids"]
    assert len(piece.tokens) == len(told) + ended
    offsets = [token.offset for token in piece.tokens]
    assert offsets == sorted(offsets)
    for token in piece.tokens[: len(told)]:
        if "\ufffd" not in token.text:  # else a part of a character
            assert piece.text.startswith(token.text, token.offset)
    if ended:
        assert (piece.tokens[-1].text, piece.tokens[-1].offset) == (TOKENIZER.eos_token, len(piece.text))


def test_nothing_is_known_of_a_prompts_first_token() -> None:
    piece, _ = answered("def main(", "self", echo=True)
    logprobs = completion_logprobs(piece.tokens, top=2)
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert all(-0.5 in entry.values() and max(entry.values()) == -0.25 for entry in logprobs["top_logprobs"][1:])


def test_of_a_text_that_was_stopped_only_tokens_that_begin_before_the_stop_are_told() -> None:
    whole, _ = answered("x", "return self.name")
    piece, reason = answered("x", "return self.name", stops=["lf."])
    assert (piece.text, reason) == ("return se", STOP)
    assert piece.tokens == [token for token in whole.tokens if token.offset < len("return se")]


def test_without_being_asked_for_no_token_is_named() -> None:
    assert answered("def main(", "self", echo=True, top=None)[0] == Piece("def main(self", [])


def test_a_part_of_a_character_has_no_bytes_of_its_own() -> None:
    piece, _ = answered("x", "🙂 a")
    content = chat_logprobs(piece.tokens)["content"]
    assert content[0]["bytes"] is None
    assert bytes(content[-1]["bytes"]).decode() == content[-1]["token"]
    assert [other["logprob"] for other in content[-1]["top_logprobs"]] == [-0.25, -0.5]


def test_an_answer_that_nodes_could_not_finish_is_no_answer() -> None:
    async def failed() -> Any:
        answer = Answer(torch.tensor([1, 2]), Asked(Sampling(), (), 0, True, 0), TOKENIZER)
        answer.continuation.finish_reason = FAILED
        answer.continuation.tell(None)
        with pytest.raises(RequestError, match="the nodes could not finish it") as caught:
            await answer.whole()
        return caught.value.status

    assert asyncio.run(failed()) == 503
