"""Held-out source files as tokens with places, and what of them also stands in files the demo model was trained on."""

from __future__ import annotations

import hashlib
import io
import keyword
import tokenize
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

from testbed.demo.corpus import Document

CONTEXT_CHARACTERS = 240  # about 80 tokens of the demo model: short enough for hundreds of items in minutes
NAME_CHARACTERS = 4  # shorter ones say little


@dataclass(frozen=True, slots=True)
class Token:
    """A token of Python and where it stands in its file, in characters."""

    kind: int  # of the module `token`
    text: str
    start: int

    @property
    def is_name(self) -> bool:
        return self.kind == tokenize.NAME and not keyword.iskeyword(self.text)


@dataclass(frozen=True, slots=True)
class Source:
    """One file that Python's own tokenizer reads."""

    document: Document
    tokens: tuple[Token, ...]

    @property
    def text(self) -> str:
        return self.document.text

    def context(self, end: int) -> str | None:
        """Whole lines before `end`, and the begun one: CONTEXT_CHARACTERS at most. None at the start of a file."""
        first = self.text.find("\n", max(0, end - CONTEXT_CHARACTERS), end) + 1
        return self.text[first:end] if first and end - first >= CONTEXT_CHARACTERS // 2 else None

    def names_between(self, begin: int, end: int) -> set[str]:
        """Names that stand wholly or in part between two places, those of one to three characters left out."""
        first, last = (bisect_left(self.tokens, place, key=lambda token: token.start) for place in (begin, end))
        return {t.text for t in self.tokens[first:last] if t.is_name and len(t.text) >= NAME_CHARACTERS}

    def line_around(self, place: int) -> str:
        """The line of a place and the one before it."""
        start = self.text.rfind("\n", 0, max(0, self.text.rfind("\n", 0, place))) + 1
        end = self.text.find("\n", place)
        return self.text[start : end if end >= 0 else len(self.text)]


def read_source(document: Document) -> Source | None:
    """None for a file that is not valid Python: some of the library's tests are broken on purpose."""
    starts = [0, *accumulate(len(line) + 1 for line in document.text.split("\n"))]
    try:
        found = tokenize.generate_tokens(io.StringIO(document.text).readline)
        return Source(document, tuple(Token(t.type, t.string, starts[t.start[0] - 1] + t.start[1]) for t in found))
    except (tokenize.TokenError, SyntaxError):
        return None


def pairs_of_lines(text: str) -> Iterator[bytes]:
    """A short hash of every two consecutive lines."""
    lines = text.split("\n")
    for first, second in pairwise(lines):
        yield fingerprint(f"{first}\n{second}")


def fingerprint(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


def seen_in_training(training: Iterable[Document]) -> frozenset[bytes]:
    """Every two consecutive lines of the training files."""
    return frozenset(pair for document in training for pair in pairs_of_lines(document.text))
