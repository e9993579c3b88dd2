"""Text of tokens that come one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

UNFINISHED = "\ufffd"  # a character whose last bytes are still to come
CONTEXT = 8  # tokens before the first that it is decoded with


class TextStream:
    """Says of every token what it adds to the text. Together it is what decoding all tokens at once gives."""

    def __init__(self, tokenizer: Any, after: Sequence[int] = ()) -> None:
        """`after`: token ids of a text that they continue. Where words carry the space before them (SentencePiece),
        a tokenizer drops that of the first token it is given, which is none where a text goes on.
        """
        self._tokenizer = tokenizer
        self._ids = list(after[-CONTEXT:])
        self._shown, self._since = len(self._ids), 0  # tokens already said; those before them needed for what follows

    def add(self, token_id: int) -> str:
        """What is certain by now; empty within a character."""
        self._ids.append(token_id)
        text = self._text_after_shown()
        if text.endswith(UNFINISHED):
            return ""
        self._since, self._shown = self._shown, len(self._ids)
        return text

    def rest(self) -> str:
        """What was held back: at the end."""
        text = self._text_after_shown()
        self._shown = len(self._ids)
        return text

    def _text_after_shown(self) -> str:
        before, whole = (self._decode(self._ids[self._since : end]) for end in (self._shown, len(self._ids)))
        return whole[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class Listener:
    """Told of a continuation's tokens, as its `tell`; keeps their text, and passes it on as it comes."""

    def __init__(self, tokenizer: Any, after: Sequence[int], show: Callable[[str], None] = lambda _piece: None) -> None:
        self._stream, self._show = TextStream(tokenizer, after), show
        self._pieces: list[str] = []

    def __call__(self, token_id: int | None) -> None:
        piece = self._stream.rest() if token_id is None else self._stream.add(token_id)
        self._pieces.append(piece)
        self._show(piece)

    @property
    def text(self) -> str:
        return "".join(self._pieces)


def text_of(tokenizer: Any, token_ids: Sequence[int], after: Sequence[int] = ()) -> str:
    """What tokens add to a text whose tokens stand in `after`."""
    stream = TextStream(tokenizer, after)
    return "".join([*map(stream.add, token_ids), stream.rest()])
