"""What docs/evaluation.md says of the shipped model, computed again and against what was recorded."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from testbed.evaluation.accuracy import mean_interval
from testbed.evaluation.harness import Scores
from testbed.evaluation.items import FRESH, STDLIB
from testbed.evaluation.make_tasks import FACTS, cached_tasks
from testbed.evaluation.plain import model_sha256, plain_scores

pytestmark = [pytest.mark.torch, pytest.mark.timeout(600)]  # half a minute on a core of its own

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).parents[1] / "fixtures" / "plain_scores.json"  # python -m testbed.evaluation.plain
ABOVE_CHANCE = 0.25


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(RECORDED.read_text())
    return document


@pytest.fixture(scope="module")
def facts() -> dict[str, Any]:
    tasks: dict[str, Any] = json.loads((cached_tasks() / FACTS).read_text())["tasks"]
    return tasks


@pytest.fixture(scope="module")
def fresh() -> Iterator[dict[str, Scores]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield plain_scores([FRESH])
    torch.set_num_threads(before)


def pooled(tasks: dict[str, Any], tag: str) -> tuple[list[float], float]:
    """The scores of all items, and what chance would get of them."""
    names = [name for name in tasks if name.startswith(FRESH) == (tag == FRESH)]
    scores = [score for name in names for score in tasks[name]["scores"]]
    return scores, sum(tasks[name]["chance"] * len(tasks[name]["scores"]) for name in names) / len(scores)


def row(name: str, scores: list[float], chance: float) -> str:
    mean, low, high = (100 * value for value in mean_interval(scores))
    above = int(low - 100 * chance)
    return f"| {name} | {len(scores)} | {mean:.1f} ({low:.1f} to {high:.1f}) | {100 * chance:.1f} | {above} |"


def test_on_500_items_that_no_kind_was_chosen_by_the_model_is_25_points_above_chance(
    fresh: dict[str, Scores], facts: dict[str, Any]
) -> None:
    scores, chance = pooled({name: {**facts[name], "scores": it.score_I} for name, it in fresh.items()}, FRESH)
    assert len(scores) >= 500
    assert mean_interval(scores).low - chance >= ABOVE_CHANCE


def test_the_recorded_scores_are_of_this_model_and_of_these_items(
    recorded: dict[str, Any], facts: dict[str, Any]
) -> None:
    assert recorded["model"] == model_sha256()
    if platform.python_version() != recorded["python"]:
        pytest.skip(f"recorded with Python {recorded['python']}, whose library has other items")
    for name, task in recorded["tasks"].items():
        assert (task["sha256"], len(task["scores"])) == (facts[name]["sha256"], facts[name]["items"])


def test_the_scores_computed_now_are_the_recorded_ones(recorded: dict[str, Any], fresh: dict[str, Scores]) -> None:
    if platform.python_version() != recorded["python"]:
        pytest.skip(f"recorded with Python {recorded['python']}, whose library has other items")
    computed = [score for name in fresh for score in fresh[name].score_I]
    before = [score for name in fresh for score in recorded["tasks"][name]["scores"]]
    turned = sum(ours != theirs for ours, theirs in zip(computed, before, strict=True))
    assert turned <= len(before) // 100  # another processor may round a tie the other way


@pytest.mark.parametrize("tag", [STDLIB, FRESH])
def test_every_figure_of_the_documented_table_is_that_of_the_recorded_scores(
    tag: str, recorded: dict[str, Any]
) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, task in recorded["tasks"].items():
        if name.startswith(FRESH) == (tag == FRESH):
            assert row(f"`{name}`", task["scores"], task["chance"]) in text
    scores, chance = pooled(recorded["tasks"], tag)
    assert row("these five together", scores, chance) in text
    assert mean_interval(scores).low - chance >= ABOVE_CHANCE
