"""What is asked about a source file: the candidates of each kind of item, in the order of the file."""

from __future__ import annotations

import token
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from testbed.evaluation.source import NAME_CHARACTERS, Source

CLOSERS = (")", "]", "}", ",")
STATEMENTS = ("if", "for", "return", "raise")
CHOICES = 4
LINE_CHARACTERS = range(16, 49)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A question and its answer. `choices` is empty where the answer is to be generated."""

    path: str
    place: int  # of the answer in the file, in characters
    context: str
    answer: str
    choices: tuple[str, ...]
    lines: str  # the answer's line and the one before it


Find = Callable[[Source], Iterator[Candidate]]


def _candidate(source: Source, place: int, answer: str, choices: tuple[str, ...] = ()) -> Iterator[Candidate]:
    context = source.context(place)
    if context is not None:
        yield Candidate(source.document.path, place, context, answer, choices, source.line_around(place))


def closers(source: Source) -> Iterator[Candidate]:
    """Which of `)`, `]`, `}` and `,` comes next, after a letter or digit."""
    for item in source.tokens:
        if item.kind == token.OP and item.text in CLOSERS and source.text[item.start - 1].isalnum():
            yield from _candidate(source, item.start, item.text, CLOSERS)


def statements(source: Source) -> Iterator[Candidate]:
    """Which of `if`, `for`, `return` and `raise` the next line begins with; its indentation is given."""
    for before, item in pairwise(source.tokens):
        if before.kind in (token.NEWLINE, token.INDENT, token.DEDENT, token.NL) and item.text in STATEMENTS:
            yield from _candidate(source, item.start, item.text, STATEMENTS)


def names(source: Source) -> Iterator[Candidate]:
    """Which of four names comes next, all of which stand in the lines before; the wrong ones are as long, or nearly."""
    for item in source.tokens:
        context = source.context(item.start) if item.is_name and len(item.text) >= NAME_CHARACTERS else None
        if context is None or source.text[item.start - 1] not in " .([":
            continue
        known = source.names_between(item.start - len(context), item.start)
        others = {name for name in known if not (name.startswith(item.text) or item.text.startswith(name))}
        if item.text in known and len(others) >= CHOICES - 1:
            yield from _candidate(source, item.start, item.text, _mixed(item.text, others))


def lines(source: Source) -> Iterator[Candidate]:
    """Which of four lines of the file comes next, all with the same indentation and about as long."""
    begins = {item.start for item in source.tokens if item.kind == token.NAME}  # not in a docstring
    alike: dict[int, set[str]] = {}
    found, place = [], 0
    for line in source.text.split("\n"):
        bare, indent = line.strip(), len(line) - len(line.lstrip(" "))
        if len(bare) in LINE_CHARACTERS and place + indent in begins:
            alike.setdefault(indent, set()).add(bare)
            found.append((place + indent, indent, bare))
        place += len(line) + 1
    for start, indent, bare in found:
        others = {other for other in alike[indent] if other[0] != bare[0]}
        if len(others) >= CHOICES - 1:
            yield from _candidate(source, start, bare, _mixed(bare, others))


def _mixed(answer: str, others: set[str]) -> tuple[str, ...]:
    """The answer among the others that come nearest to its length."""
    nearest = sorted(others, key=lambda other: (abs(len(other) - len(answer)), other))
    return tuple(sorted([answer, *nearest[: CHOICES - 1]]))


def line_ends(source: Source) -> Iterator[Candidate]:
    """How a line ends after its last name or number: two or more brackets and perhaps a colon, to be generated."""
    for item in source.tokens:
        if item.kind == token.OP and item.text in ")]}" and source.text[item.start - 1].isalnum():
            end = source.text.find("\n", item.start)
            rest = source.text[item.start : end]
            if len(rest) >= 2 and set(rest) <= set(")]}:,"):
                yield from _candidate(source, item.start, rest)


def assignments(source: Source) -> Iterator[Candidate]:
    """The name in `self.name = name`, to be generated."""
    for five in zip(*(source.tokens[i:] for i in range(5)), strict=False):
        own, dot, attribute, equals, value = five
        if (own.text, dot.text, equals.text) == ("self", ".", "=") and attribute.text == value.text:
            yield from _candidate(source, equals.start + 1, value.text)


def attributes(source: Source) -> Iterator[Candidate]:
    """An attribute's name after `self.`, to be generated; it stands in the lines before."""
    for own, dot, attribute in zip(source.tokens, source.tokens[1:], source.tokens[2:], strict=False):
        if (own.text, dot.text) == ("self", ".") and attribute.is_name and len(attribute.text) >= NAME_CHARACTERS:
            context = source.context(attribute.start)
            if context and attribute.text in source.names_between(attribute.start - len(context), attribute.start):
                yield from _candidate(source, attribute.start, attribute.text)
