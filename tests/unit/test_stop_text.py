"""A text that comes in pieces ends before its first stop string, wherever the pieces are cut."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from hypothesis import given
from hypothesis import strategies as st

from testbed.serve.answer import StopText

pytestmark = [pytest.mark.torch]

PIECES = st.lists(st.text("ab", max_size=4), max_size=8)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)


def said(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    stream = StopText(stops)
    shown = [stream.add(piece) for piece in pieces]
    return "".join([*shown, stream.rest()]), stream.found


@given(PIECES, STOPS)
def test_it_ends_before_the_stop_that_was_whole_first(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    shown, found = said(pieces, stops)
    assert found == any(stop in text for stop in stops)
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    if not found:
        assert shown == text
    else:
        assert any(text.startswith(stop, len(shown)) for stop in stops)


@given(PIECES, st.text("ab", min_size=1, max_size=4))
def test_with_one_stop_the_cuts_make_no_difference(pieces: list[str], stop: str) -> None:
    assert said(pieces, [stop]) == said(["".join(pieces)], [stop])


def test_what_cannot_begin_a_stop_is_said_at_once() -> None:
    stream = StopText(["END"])
    assert [stream.add(piece) for piece in ("some E", "N", "x", " EN", "D more")] == ["some ", "", "ENx", " ", ""]
    assert stream.found
