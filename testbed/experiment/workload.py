"""What a run scores and continues: held-out source of the running Python's standard library."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from testbed.demo.corpus import Document, documents
from testbed.errors import ConfigError

TEXT = "held-out files of the running Python's standard library"

Tokenise = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Window:
    """Consecutive tokens of one held-out file."""

    path: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Workload:
    """Windows to score, windows to continue, and the hash of the texts that they come from."""

    scored: list[Window]
    continued: list[Window]
    text_sha256: str


def choose(tokenise: Tokenise, *, score: int, score_tokens: int, generate: int, prompt_tokens: int) -> Workload:
    """The same windows every time for the same Python and tokenizer: evenly spaced files, a window from their middle.

    Each scored window has one token more than `score_tokens`, so that many are predicted.
    Raises ConfigError where there is too little held-out text.
    """
    files = list(documents(held_out=True))
    scored = _windows(tokenise, files, score, score_tokens + 1)
    continued = _windows(tokenise, files[::-1], generate, prompt_tokens)
    used = sorted({window.path for window in [*scored, *continued]})
    digest = hashlib.sha256()
    for document in files:
        if document.path in used:
            digest.update(document.text.encode())
    return Workload(scored, continued, digest.hexdigest())


def _windows(tokenise: Tokenise, files: Sequence[Document], count: int, length: int) -> list[Window]:
    """One window per file, from files spread evenly over those that are long enough."""
    # No tokenizer in use averages 8 characters a token, so these files are long enough.
    candidates = [file for file in files if len(file.text) >= 8 * length]
    windows: list[Window] = []
    for i in range(min(count, len(candidates))):
        document = candidates[i * len(candidates) // count]
        token_ids = tokenise(document.text)
        start = (len(token_ids) - length) // 2
        if start >= 0:
            windows.append(Window(document.path, token_ids[start : start + length]))
    if len(windows) < count:
        raise ConfigError(
            f"[workload] asks for {count} windows of {length} tokens, the standard library's held-out files give "
            f"{len(windows)}: ask for fewer or shorter ones"
        )
    return windows
