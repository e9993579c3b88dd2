"""Text of tokens that come one by one."""

from __future__ import annotations

from typing import Any

UNFINISHED = "\ufffd"  # a character whose last bytes are still to come


class TextStream:
    """Says of every token what it adds to the text. Together it is what decoding all tokens at once gives."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown, self._since = 0, 0  # tokens already said, and those needed before them to decode what follows

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
