"""docs/logs.md: its commands work as they are written, and print what the page shows."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("duckdb")
pytest.importorskip("vl_convert")

from testbed.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(sh|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_COMPARED = re.compile(r"[─. ]*")  # rules, and lines left out


class Step(NamedTuple):
    arguments: list[str]
    shown: list[str]  # lines of its output that the page has


def steps() -> list[Step]:
    """Every `testbed logs` command of the page, in its order, with the output below it."""
    found: list[Step] = []
    for language, text in BLOCK.findall((REPOSITORY / "docs" / "logs.md").read_text(encoding="utf-8")):
        if language == "text":
            found[-1].shown.extend(drawn_closer(line) for line in text.splitlines() if not NOT_COMPARED.fullmatch(line))
        else:
            commands = shlex.split(text.replace("\\\n", " "))
            assert commands[0] == "testbed", text
            found.append(Step(commands[1:], []))
    return [step for step in found if step.arguments[0] == "logs"]


def drawn_closer(line: str) -> str:
    """The page leaves out blanks, so that wide tables fit on it."""
    return " ".join(line.split())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a fresh checkout's, as far as logs go."""
    shutil.copytree(REPOSITORY / "logs" / "sample", tmp_path / "logs" / "sample")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    return tmp_path


def test_every_command_of_the_tutorial_works_and_prints_what_the_page_shows(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in steps():
        code = main(step.arguments)
        printed = capsys.readouterr()
        assert (code, printed.err) == (0, ""), step.arguments
        lines = set(map(drawn_closer, printed.out.splitlines()))
        assert [line for line in step.shown if line not in lines] == [], step.arguments
    assert {path.name for path in checkout.iterdir()} == {"logs", "sample.html", "sample.json.gz"}


def test_the_tutorial_shows_each_way_to_look_at_a_run() -> None:
    commands = [step.arguments[1] for step in steps()]
    assert commands[0] == "ls"
    assert commands[-2:] == ["report", "trace"]
    assert {"show", "compare", "query", "replay"} <= set(commands)
