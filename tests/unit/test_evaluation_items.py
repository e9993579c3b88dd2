"""Items of the offline tasks, from small texts whose answers are plain, and from the standard library itself."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.demo.corpus import Document, documents, is_held_out
from testbed.errors import ConfigError
from testbed.evaluation import kinds
from testbed.evaluation.items import FRESH, ITEMS_PER_FILE, STDLIB, Task, make_items
from testbed.evaluation.kinds import CHOICES, CLOSERS, Find
from testbed.evaluation.make_tasks import FACTS, write_tasks
from testbed.evaluation.source import fingerprint, pairs_of_lines, read_source

BEFORE = "# before the class stand lines of comment that make the context long enough\n" * 3
SOURCE = f"""{BEFORE}
class Reader:
    def __init__(self, stream, errors, length):
        self.stream = stream
        self.errors = [errors, length]
        if length:
            raise ValueError(str(length))
        return self.stream
"""


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return make_items(documents(held_out=True), documents(held_out=False))


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {document.path: document.text for document in documents(held_out=True)}


def answers(find: Find, text: str = SOURCE) -> list[str]:
    source = read_source(Document("reader.py", text))
    assert source is not None
    return [candidate.answer for candidate in find(source)]


@pytest.mark.parametrize(
    ("find", "found"),
    [
        (kinds.closers, [",", ",", ",", ")", ",", "]", ")"]),
        (kinds.statements, ["if", "raise", "return"]),
        (kinds.assignments, ["stream"]),
        (kinds.attributes, ["stream", "errors", "stream"]),
        (kinds.line_ends, ["):", "))"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_kind_finds_what_it_asks_about(find: Find, found: list[str]) -> None:
    assert answers(find) == found


def test_a_name_is_asked_for_only_among_names_that_stand_in_the_lines_before() -> None:
    source = read_source(Document("reader.py", SOURCE))
    assert source is not None
    found = list(kinds.names(source))
    assert "errors" in [item.answer for item in found]
    for item in found:
        assert all(choice in item.context for choice in item.choices)


def test_a_file_that_is_no_python_is_left_out() -> None:
    assert read_source(Document("broken.py", "def (:\n  '''")) is None


def test_a_line_that_a_training_file_has_too_is_not_asked_about() -> None:
    held_out = Document("reader.py", SOURCE)
    names = {task.kind.name: len(task.items) for task in make_items([held_out], [])}
    assert names["stdlib_assignments"] == 1
    copied = {task.kind.name: len(task.items) for task in make_items([held_out], [Document("copy.py", SOURCE)])}
    assert set(copied.values()) == {0}


def test_there_are_500_items_and_the_tasks_that_a_user_gets_have_most_of_them(tasks: list[Task]) -> None:
    for tag in (STDLIB, FRESH):
        assert sum(len(task.items) for task in tasks if tag in task.kind.tags) >= 500
    assert all(task.items for task in tasks)


def test_fresh_items_are_of_the_kinds_chosen_and_none_was_asked_when_they_were(tasks: list[Task]) -> None:
    chosen = {task.kind.name: task for task in tasks if STDLIB in task.kind.tags}
    fresh = {task.kind.name.replace(FRESH, STDLIB): task for task in tasks if FRESH in task.kind.tags}
    assert set(fresh) == set(chosen)
    for name, task in fresh.items():
        assert not {item.context for item in task.items} & {item.context for item in chosen[name].items}
        assert not {(item.path, item.place) for item in task.items} & {
            (item.path, item.place) for item in chosen[name].items
        }


def test_every_answer_stands_in_the_file_right_after_its_context(tasks: list[Task], texts: dict[str, str]) -> None:
    for task in tasks:
        for item in task.items:
            text = texts[item.path]
            assert text[item.place :].lstrip(" ").startswith(item.answer)
            assert text[: item.place].endswith(item.context)


def test_every_item_is_from_a_held_out_file_and_stands_in_no_training_file(tasks: list[Task]) -> None:
    seen = {pair for document in documents(held_out=False) for pair in pairs_of_lines(document.text)}
    for task in tasks:
        for item in task.items:
            assert is_held_out(item.path)
            assert fingerprint(item.lines) not in seen


def test_choices_are_four_different_ones_with_one_that_is_right_and_none_that_begins_with_it(
    tasks: list[Task],
) -> None:
    for task in tasks:
        for item in task.items:
            assert len(set(item.choices)) == len(item.choices) == (0 if task.kind.answer else CHOICES)
            others = [choice for choice in item.choices if choice != item.answer]
            assert not any(other.startswith(item.answer) or item.answer.startswith(other) for other in others)


def test_no_answer_and_no_file_is_asked_for_too_often(tasks: list[Task]) -> None:
    for task in tasks:
        if task.items[0].choices == CLOSERS:
            assert {choice: sum(item.answer == choice for item in task.items) for choice in CLOSERS} == dict.fromkeys(
                CLOSERS, len(task.items) // 4
            )
        paths = [item.path for item in task.items]
        assert max(map(paths.count, paths)) <= ITEMS_PER_FILE
        assert task.chance <= 0.25


def test_items_are_the_same_in_another_process_with_another_hash_seed(tasks: list[Task], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "testbed.evaluation.make_tasks", "--out", str(tmp_path / "tasks")]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=100).stdout
    facts = json.loads(told)
    assert facts == json.loads((tmp_path / "tasks" / FACTS).read_text())
    for task in tasks:
        written = (tmp_path / "tasks" / f"{task.kind.name}.jsonl").read_bytes()
        assert written == task.jsonl().encode()
        assert facts["tasks"][task.kind.name]["sha256"] == hashlib.sha256(written).hexdigest()


def test_a_folder_that_is_there_is_not_written_to(tasks: list[Task], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already; name a new folder"):
        write_tasks(tasks, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_line(tasks: list[Task], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_tasks(tasks, tmp_path / "file" / "tasks")
