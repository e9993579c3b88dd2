"""The text that a run scores."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.demo.corpus import documents, is_held_out
from testbed.errors import ConfigError
from testbed.experiment.workload import choose


def bytes_of(text: str) -> list[int]:
    """A tokenizer whose tokens are bytes."""
    return list(text.encode())


def chosen(score: int = 5, score_tokens: int = 64, generate: int = 2, prompt_tokens: int = 16):
    return choose(bytes_of, score=score, score_tokens=score_tokens, generate=generate, prompt_tokens=prompt_tokens)


def test_the_same_python_gives_the_same_windows_and_the_same_hash() -> None:
    assert chosen() == chosen()


def test_another_choice_of_files_has_another_hash() -> None:
    assert chosen(score=5).text_sha256 != chosen(score=6).text_sha256


def test_every_window_is_of_a_held_out_file_and_has_one_token_more_than_it_predicts() -> None:
    workload = chosen(score_tokens=64)
    assert all(is_held_out(window.path) for window in [*workload.scored, *workload.continued])
    assert {len(window.token_ids) for window in workload.scored} == {65}
    assert {len(window.token_ids) for window in workload.continued} == {16}


def test_no_file_is_scored_twice() -> None:
    paths = [window.path for window in chosen(score=20).scored]
    assert len(set(paths)) == 20


@pytest.mark.parametrize(("score", "tokens"), [(100_000, 8), (1, 100_000_000)])
def test_more_text_than_there_is_gives_one_line_that_says_what_to_do(score: int, tokens: int) -> None:
    with pytest.raises(ConfigError, match=r"^\[workload\] asks for .*: ask for fewer or shorter ones$"):
        chosen(score=score, score_tokens=tokens)


def test_held_out_and_training_files_have_nothing_in_common_and_make_up_the_library(tmp_path: Path) -> None:
    names = {f"package{i}/module{i}.py" for i in range(200)}
    for name in names:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    held_out = {document.path for document in documents(tmp_path, held_out=True)}
    training = {document.path for document in documents(tmp_path, held_out=False)}
    assert held_out | training == names
    assert not held_out & training
    assert 2 <= len(held_out) <= 25  # about a twentieth of 200


def test_third_party_packages_are_not_the_library(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("")
    assert not [*documents(tmp_path, held_out=True), *documents(tmp_path, held_out=False)]
