"""`testbed eval` as a user types it: the same accuracy as the plain model's, and a table that its log bears out."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from processes import TESTBED, run, run_file

from testbed.errors import RunLogError
from testbed.evaluation.harness import Scores
from testbed.evaluation.plain import plain_scores
from testbed.evaluation.results import ALL, summarise_evaluation
from testbed.runlog.reader import read_events

pytestmark = [pytest.mark.torch, pytest.mark.timeout(300)]  # a busy machine imports slowly

TASKS, LIMIT = ["stdlib_closers", "stdlib_attributes"], 10  # of each
EXACT = '[wire]\ndown = "fp32"\nup = "fp32"'
POLICIES = ('name = "topk"', 'name = "wlr"\ntheta = 0.5')


@pytest.fixture(scope="module")
def plain() -> Iterator[dict[str, Scores]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield plain_scores(TASKS, LIMIT)
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("eval")
    path = run_file(folder, EXACT, policies=POLICIES)
    done = run(
        [TESTBED, "eval", str(path), "--tasks", ",".join(TASKS), "--limit", str(LIMIT), "--json"], folder, within_s=240
    )
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def events(evaluated: dict[str, Any], policy: int) -> dict[str, dict[str, Any]]:
    found = read_events(Path(evaluated["directory"]))
    return {event["task"]: event for event in found if event["kind"] == "evaluated" and event["policy"] == policy}


def test_topk_over_sockets_in_fp32_answers_every_item_as_the_plain_model_does(
    plain: dict[str, Scores], evaluated: dict[str, Any]
) -> None:
    over_sockets = events(evaluated, 0)
    assert sum(len(scores.score_I) for scores in plain.values()) == len(TASKS) * LIMIT
    for task, scores in plain.items():
        assert over_sockets[task]["items"] == scores.item_I
        assert over_sockets[task]["scores"] == scores.score_I
    assert 0 < sum(sum(scores.score_I) for scores in plain.values()) < len(TASKS) * LIMIT, (
        "some are right, some are not"
    )


def test_the_answers_themselves_are_the_plain_models_too(plain: dict[str, Scores], evaluated: dict[str, Any]) -> None:
    lines = (Path(evaluated["directory"]) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    over_sockets = {(row["task"], row["doc_id"]): row["filtered_resps"] for row in written if row["policy"] == "topk"}
    for scores in plain.values():
        for row in scores.samples:
            assert over_sockets[row["task"], row["doc_id"]] == json.loads(json.dumps(row["filtered_resps"]))


def test_a_policy_that_drops_pairs_is_asked_the_same_items_in_the_same_prompts(evaluated: dict[str, Any]) -> None:
    first, second = events(evaluated, 0), events(evaluated, 1)
    for task, event in first.items():
        assert all(second[task][key] == event[key] for key in ("items", "prompts", "first_prompt"))
    topk, wlr = evaluated["policies"]
    assert topk["dropped_mass"] == 0 < wlr["dropped_mass"]


def test_the_mass_that_each_task_lost_is_told_and_over_all_tasks_it_is_the_runs(evaluated: dict[str, Any]) -> None:
    dropped = {(row["policy"], row["task"]): row["dropped_mass"] for row in evaluated["rows"]}
    assert all(dropped["topk", task] == 0 < dropped["wlr θ=0.5", task] for task in [*TASKS, ALL])
    of_tasks = [dropped["wlr θ=0.5", task] for task in TASKS]
    assert min(of_tasks) < dropped["wlr θ=0.5", ALL] < max(of_tasks)
    assert dropped["wlr θ=0.5", ALL] == pytest.approx(evaluated["policies"][1]["dropped_mass"])


def test_the_row_over_all_items_is_the_sum_of_the_tasks_rows(evaluated: dict[str, Any]) -> None:
    for policy in ("topk", "wlr θ=0.5"):
        rows = {row["task"]: row for row in evaluated["rows"] if row["policy"] == policy}
        over_all = rows.pop(ALL)
        assert list(rows) == TASKS
        for key in ("items", "prompts", "gained", "lost"):
            assert over_all[key] == sum(row[key] for row in rows.values())
        for key in ("prefill_block_sum_s", "decode_sum_s"):
            assert over_all[key] == pytest.approx(sum(row[key] for row in rows.values()))
        assert over_all["accuracy"] == pytest.approx(sum(row["accuracy"] for row in rows.values()) / len(TASKS))


def test_every_block_of_the_log_is_in_the_table_once(evaluated: dict[str, Any]) -> None:
    for policy, over_run in zip(("topk", "wlr θ=0.5"), evaluated["policies"], strict=True):
        (over_all,) = (row for row in evaluated["rows"] if row["policy"] == policy and row["task"] == ALL)
        assert over_all["prefill_block_sum_s"] == pytest.approx(over_run["prefill_block_sum_s"])
        assert over_all["prefill_cut"] == pytest.approx(over_run["prefill_cut"])
        assert over_all["decode_sum_s"] == pytest.approx(over_run["decode_sum_s"])


def test_table_figure_and_samples_are_written_beside_the_log(evaluated: dict[str, Any]) -> None:
    folder = Path(evaluated["directory"])
    assert {Path(path).name for path in evaluated["written"]} == {
        "evaluation.json", "samples.jsonl", "accuracy.png", "accuracy.svg",
    }  # fmt: skip
    assert all(Path(path).parent == folder and Path(path).stat().st_size for path in evaluated["written"])
    assert summarise_evaluation(folder).document()["rows"] == evaluated["rows"], "read again from the log"


def test_the_runs_manifest_says_on_what_everyone_computed_and_in_which_weights(evaluated: dict[str, Any]) -> None:
    manifest = json.loads((Path(evaluated["directory"]) / "manifest.json").read_text())
    assert manifest["computes"]["base_station"] == "torch cpu float32"
    assert set(manifest["computes"]["nodes"]) == set(manifest["devices"])
    assert all("float32 from float16" in said for said in manifest["computes"]["nodes"].values())


def test_a_log_of_no_evaluation_is_told_in_one_line(evaluated: dict[str, Any], tmp_path: Path) -> None:
    folder = Path(evaluated["directory"])
    (tmp_path / "manifest.json").write_bytes((folder / "manifest.json").read_bytes())
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "events.jsonl").write_text("".join(line for line in lines if '"evaluated"' not in line))
    with pytest.raises(RunLogError, match="holds no evaluation"):
        summarise_evaluation(tmp_path)
