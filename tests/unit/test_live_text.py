"""Text of tokens that continue another text, whatever the tokenizer does with spaces."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from testbed.errors import ConfigError
from testbed.live.prompting import chat_token_ids, token_ids_of
from testbed.live.sampling import Sampling
from testbed.live.text import Listener, TextStream, text_of

pytestmark = [pytest.mark.torch]

WORDS = ["<s>", "</s>", "▁Hello", "▁world", "▁", "!", "He", "llo"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def tokenizer_with_spaces_before_words() -> Any:
    """As SentencePiece's are, Mixtral's among them: the first space of a decoded text is dropped."""
    vocabulary = {word: index for index, word in enumerate([*WORDS, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = dict(zip(("bos_token", "eos_token"), WORDS, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZER = tokenizer_with_spaces_before_words()


def ids(*words: str) -> list[int]:
    return [int(TOKENIZER.convert_tokens_to_ids(word)) for word in words]


def test_the_space_before_the_first_new_word_is_kept() -> None:
    hello, world = ids("<s>", "▁Hello"), ids("▁world")
    assert TOKENIZER.decode(hello + world, skip_special_tokens=True) == "Hello world"
    assert text_of(TOKENIZER, world, after=hello) == " world"
    assert text_of(TOKENIZER, world) == "world", "where it begins a text it has none"


@given(st.lists(st.sampled_from(WORDS[2:])), st.lists(st.sampled_from([*WORDS[2:], "🙂", "é"])))
def test_what_comes_in_pieces_is_the_text_that_was_missing(before: list[str], words: list[str]) -> None:
    start = ids("<s>", "▁Hello", *before)
    told = [token for word in words for token in (ids(word) if word in WORDS else byte_ids(word))]
    shown: list[str] = []
    listener = Listener(TOKENIZER, start, shown.append)
    for token in [*told, None]:
        listener(token)
    whole, known = (TOKENIZER.decode(some, skip_special_tokens=True) for some in (start + told, start))
    assert listener.text == "".join(shown) == whole[len(known) :]


def byte_ids(character: str) -> list[int]:
    return ids(*(f"<0x{byte:02X}>" for byte in character.encode()))


def test_a_character_is_said_when_it_is_whole() -> None:
    stream = TextStream(TOKENIZER, after=ids("▁Hello"))
    assert [stream.add(token) for token in byte_ids("🙂")] == ["", "", "", "🙂"]


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        token_ids_of(TOKENIZER, "a\udcff")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        chat_token_ids(TOKENIZER, [{"role": "user", "content": "a\udcff"}])


def test_how_to_draw_is_refused_where_nothing_is_drawn() -> None:
    assert Sampling(4, do_sample=True, temperature=0.5, top_k=0, seed=1).temperature == 0.5
    for options in ({"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}, {"seed": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}: without effect"):
            Sampling(4, **options)
