"""What `testbed eval` is told, before anything is started: policies, tasks, and mistakes in them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from processes import TESTBED

from testbed.cli import main
from testbed.config import load_run_file
from testbed.errors import ConfigError
from testbed.evaluation.policies import policies_override

RUN_FILE = Path(__file__).parents[2] / "configs" / "eval.toml"


def test_policies_of_the_command_line_replace_the_run_files_with_topk_before_them() -> None:
    config = load_run_file(RUN_FILE, policies_override(["wlr:theta=0.25", "drop_late", "load_aware:budget=0.1"]))
    named = [(policy.name, dict(policy.params)) for policy in config.policies]
    assert named == [("topk", {}), ("wlr", {"theta": 0.25}), ("drop_late", {}), ("load_aware", {"budget": 0.1})]


def test_without_policies_the_run_files_stay() -> None:
    assert policies_override([]) == []
    config = load_run_file(RUN_FILE)
    assert [policy.params.get("theta") for policy in config.policies] == [None, 0.1, 0.2, 0.3, 0.4]


def test_topk_may_be_named_and_a_value_may_be_text() -> None:
    config = load_run_file(RUN_FILE, policies_override(["topk", "load_aware:budget=0.1,bandwidth=optimal"]))
    assert [(policy.name, policy.bandwidth) for policy in config.policies] == [
        ("topk", "even"),
        ("load_aware", "optimal"),
    ]


@pytest.mark.parametrize("policy", ["", "theta=0.2", "wlr:theta=", "wlr:=0.2", 'wlr:a"b=1'])
def test_a_policy_that_is_no_name_with_pairs_is_refused(policy: str) -> None:
    with pytest.raises(ConfigError, match="write NAME:KEY=VALUE"):
        policies_override([policy])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--limit", "0"], "limit"),
        (["--batch-size", "0"], "batch-size"),
        (["--policy", "wrl:theta=0.2"], 'no policy "wrl"'),
        (["--policy", "wlr:teta=0.2"], "no parameter"),
    ],
)
def test_a_mistake_in_an_option_is_one_line_and_starts_nothing(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    assert main(["eval", str(RUN_FILE), *arguments, "--tasks", "nothing", "--out", str(tmp_path / "logs")]) != 0
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert says in told.err
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        (",", "--tasks: is empty"),
        ("stdlib_closer", 'did you mean "stdlib_closers"'),
        ("stdlib,stdlib_names", "asked for twice"),
    ],
)
def test_tasks_that_cannot_be_asked_are_one_line_and_start_nothing(
    tasks: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert main(["eval", str(RUN_FILE), "--tasks", tasks, "--out", str(tmp_path / "logs")]) == ConfigError.exit_code
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert says in told.err
    assert not (tmp_path / "logs").exists()


def test_a_task_whose_data_cannot_be_fetched_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    command = [TESTBED, "eval", str(RUN_FILE), "--tasks", "arc_easy", "--out", "logs"]
    nowhere = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        command, env={**os.environ, **nowhere}, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == ConfigError.exit_code, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "its data set comes from the network" in done.stderr
    assert not (tmp_path / "logs").exists()
