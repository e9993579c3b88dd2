"""`testbed logs` on logs written by hand: what lists, follows, recovers and deletes them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.cli import logs as logs_group
from testbed.cli import main
from testbed.cli.logs_prune import to_delete
from testbed.errors import RunLogError
from testbed.runlog.catalog import Run, State
from testbed.runlog.follow import follow
from testbed.runlog.manifest import write_manifest
from testbed.runlog.reader import read_table
from testbed.runlog.recorder import Recorder

DEVICES, TOKENS = ["a", "b"], 3
MANIFEST = {
    "config": {
        "workload": {"score_prompts": 1, "generate_prompts": 0, "new_tokens": 0},
        "policy": [{"name": "topk"}], "on_loss": {"invalid_above": 0.01}, "radio": None,
    },
    "policies": ["topk"], "devices": DEVICES, "layers": 1, "links": "loopback, as they are", "emulated": {},
    "model": {"name": "model", "type": "mixtral"},
}  # fmt: skip


def record_round(recorder: Recorder, number: int, dilation: float = 2.0, **columns: Any) -> None:
    kept_TK = np.ones((TOKENS, 2), bool)
    recorder.record_round(
        {
            "round": number, "policy": 0, "prompt": 0, "layer": 0, "phase": 0, "attempt": 0, "dilation": dilation,
            "rows": 3, "experts_touched": 1, "bytes_down": 10, "bytes_up": 10, "parts_down": 1, "parts_up": 1,
            "status": 1, "state_available": True, "round_ns": 8_000_000, "rtt_ns": [4_000_000, 6_000_000], **columns,
        },
        {
            "expert": np.tile([0, 1], (TOKENS, 1)), "weight": np.full((TOKENS, 2), 0.5), "kept": kept_TK,
            "asked": np.tile([0, 1], (TOKENS, 1)), "device": np.tile([0, 1], (TOKENS, 1)),
            "final_weight": np.full((TOKENS, 2), 0.5), "orphaned": False,
        },
    )  # fmt: skip


def begun(logs: Path, name: str = "20250301-120000-small", segment_rows: int = 4) -> Recorder:
    run_dir = logs / name
    run_dir.mkdir(parents=True)
    write_manifest(run_dir, MANIFEST)
    return Recorder(run_dir, name, DEVICES, top_k=2, experts=0, segment_rows=segment_rows)


def finished(logs: Path, name: str = "20250301-120000-small", rounds: int = 5) -> Path:
    with begun(logs, name) as recorder:
        for number in range(rounds):
            record_round(recorder, number)
        recorder.event("scored", policy=0, prompt=0, tokens=2, nats=2.0, correct=1)
    return logs / name


def killed(logs: Path, name: str = "20250301-130000-small", rounds: int = 5) -> Path:
    """As a process killed by SIGKILL leaves it: nothing is sealed, and nobody holds it."""
    with begun(logs.parent / "live", name) as recorder:
        for number in range(rounds):
            record_round(recorder, number)
        shutil.copytree(logs.parent / "live" / name, logs / name)
    return logs / name


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / "logs"
    folder.mkdir()
    return folder


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


@pytest.mark.parametrize("name", logs_group.COMMANDS)
def test_every_command_shows_an_example_and_loads_nothing_heavy(name: str) -> None:
    code = (
        "import sys; from testbed.cli import main; code = main(sys.argv[1:]); heavy = ('numpy', 'pyarrow', 'duckdb', "
        "'torch', 'rich'); print('LOADED', *[name for name in heavy if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "logs", name, "--help"], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"Usage: testbed logs {name}" in done.stdout
    assert "Example: testbed logs" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_a_mistyped_subcommand_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "lst"]) == 2
    assert "No such command 'lst'" in capsys.readouterr().err


def test_ls_lists_runs_with_their_state(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(logs)
    killed(logs)
    assert main(["logs", "ls", "--logs", str(logs)]) == 0
    shown = capsys.readouterr()
    first, second = (line for line in shown.out.splitlines() if "small" in line)
    assert "finished" in first
    assert "aborted" in second
    assert "--sum-up" in shown.err
    assert main(["logs", "ls", "--logs", str(logs), "--json", "--last", "1"]) == 0
    (run,) = told(capsys)["runs"]
    assert (run["run"], run["state"], run["devices"]) == ("20250301-130000-small", "aborted", DEVICES)
    assert run["policies"][0]["perplexity"] is None


def test_ls_sums_up_once_what_has_no_figures(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = finished(logs)
    assert main(["logs", "ls", "--logs", str(logs), "--sum-up", "--json"]) == 0
    (policy,) = told(capsys)["runs"][0]["policies"]
    assert policy["perplexity"] == pytest.approx(np.e)
    assert (policy["prefill_cut"], policy["prefill_cut_low"]) == (0, None)
    for rows in run_dir.glob("*.parquet"):
        rows.unlink()
    assert main(["logs", "ls", "--logs", str(logs)]) == 0
    assert "2.718" in capsys.readouterr().out, "read from what is kept, not from the rows"


def test_recover_seals_what_a_killed_run_left_and_says_how_much(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(logs)
    run_dir = killed(logs)
    rows = {table: read_table(run_dir, table) for table in ("rounds", "tokens")}
    assert main(["logs", "recover", "--logs", str(logs), "--json"]) == 0
    recovered = {"run": run_dir.name, "rounds": 10, "tokens": 15, "lost": 0, "missing": 0, "damaged": []}
    assert told(capsys) == {"recovered": [recovered], "failed": []}
    assert not list(run_dir.glob("*.seg*"))
    assert all(read_table(run_dir, table).equals(before) for table, before in rows.items())
    assert main(["logs", "recover", "--logs", str(logs)]) == 0
    assert "nothing to recover" in capsys.readouterr().out


def test_recover_refuses_a_live_run_and_leaves_it_alone(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(begun(logs)) as recorder:
        record_round(recorder, 0)
        assert main(["logs", "recover", "latest", "--logs", str(logs)]) == RunLogError.exit_code
        assert "still being recorded" in capsys.readouterr().err
        assert main(["logs", "recover", "--logs", str(logs)]) == 0
        record_round(recorder, 1)
    assert read_table(logs / "20250301-120000-small", "rounds").num_rows == 4


def test_recover_goes_on_after_a_run_that_it_cannot_seal(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, whole = killed(logs), killed(logs, "20250301-140000-small")
    (broken / "rounds-0000.seg").write_bytes(b"nothing of ours")
    assert main(["logs", "recover", "--logs", str(logs), "--json"]) == RunLogError.exit_code
    shown = capsys.readouterr()
    document = json.loads(shown.out.splitlines()[-1])
    assert [found["run"] for found in document["recovered"]] == [whole.name]
    assert "rounds-0000.seg" in shown.err
    assert (broken / "tokens-0000.parquet").exists()


def named(days_ago: float, name: str = "small") -> str:
    return (datetime.now(timezone.utc) - timedelta(days=days_ago)).strftime(f"%Y%m%d-%H%M%S-{name}")


def test_prune_says_what_it_would_delete_and_deletes_only_when_told(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, sample = finished(logs, named(9)), finished(logs, named(1)), finished(logs, "sample")
    assert main(["logs", "prune", "--logs", str(logs), "--older-than", "5"]) == 0
    assert old.name in capsys.readouterr().out
    assert old.exists()
    assert main(["logs", "prune", "--logs", str(logs), "--older-than", "5", "--yes", "--json"]) == 0
    document = told(capsys)
    assert (document["deleted"], [run["run"] for run in document["runs"]]) == (True, [old.name])
    assert not old.exists()
    assert main(["logs", "prune", "--logs", str(logs), "--keep", "0", "--yes"]) == 0
    assert not new.exists()
    assert sample.exists()


def test_prune_never_deletes_a_running_run(logs: Path) -> None:
    with closing(begun(logs)) as recorder:
        assert main(["logs", "prune", "--logs", str(logs), "--keep", "0", "--yes"]) == 0
        record_round(recorder, 0)
    assert read_table(logs / "20250301-120000-small", "rounds").num_rows == 2


def test_prune_wants_to_be_told_what_to_keep(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = finished(logs)
    assert main(["logs", "prune", "--logs", str(logs), "--yes"]) == 2
    assert "--keep" in capsys.readouterr().err
    assert run_dir.exists()


@given(
    ages=st.lists(st.integers(0, 99).map(lambda days: days + 0.5), max_size=8, unique=True),
    running=st.sets(st.integers(0, 7)),
    keep=st.none() | st.integers(0, 9),
    older_than=st.none() | st.integers(0, 100),
)
def test_prune_deletes_exactly_what_nothing_keeps(
    ages: list[float], running: set[int], keep: int | None, older_than: int | None
) -> None:
    now = datetime.now(timezone.utc)
    runs = [
        Run(f"20250301-120000-{n}", Path(f"{n}"), now - timedelta(days=age), state, 0)
        for n, age in enumerate(sorted(ages, reverse=True))
        for state in [State.RUNNING if n in running else State.FINISHED]
    ]
    chosen = to_delete(runs, keep, older_than)
    newest = runs[max(0, len(runs) - keep) :] if keep else []
    for run in runs:
        assert run.began is not None
        young = older_than is not None and run.began >= now - timedelta(days=older_than)
        assert (run in chosen) != (run.state is State.RUNNING or run in newest or young)


def test_tail_prints_the_last_rounds_in_emulated_time(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(logs)
    assert main(["logs", "tail", "--logs", str(logs), "--json", "-n", "3"]) == 0
    rounds = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [found["round"] for found in rounds] == [2, 3, 4]
    assert (rounds[0]["round_s"], rounds[0]["slowest"], rounds[0]["slowest_s"]) == (0.004, "b", 0.003)
    assert main(["logs", "tail", "--logs", str(logs), "-n", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].split()[-4:] == ["6", "4.000", "b", "(3.000)"]
    assert "is finished" in shown.err


def test_tail_names_who_did_not_answer_and_knows_no_time_of_it(logs: Path) -> None:
    with begun(logs) as recorder:
        record_round(recorder, 0, status=[2, 3], rtt_ns=-1, round_ns=-1)
    (found,) = follow(logs / "20250301-120000-small", 10, once=True)
    assert found.unanswered == {"a": "late", "b": "lost"}
    assert (found.round_s, found.slowest, found.slowest_s) == (None, None, None)


def test_tail_follows_a_live_run_over_segments_until_it_is_sealed(logs: Path) -> None:
    recorder = begun(logs, segment_rows=4)  # two rounds
    record_round(recorder, 0)
    steps = iter(range(1, 8))

    def wait(_: float) -> None:
        number = next(steps)
        if number == 7:
            recorder.close()
        else:
            record_round(recorder, number)

    rounds = follow(logs / "20250301-120000-small", 10, once=False, wait=wait)
    assert [found.round for found in rounds] == list(range(7))


def test_tail_ends_cleanly_at_ctrl_c(
    logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[Any]:
        yield from ()
        raise KeyboardInterrupt

    finished(logs)
    monkeypatch.setattr("testbed.runlog.follow.follow", interrupted)
    assert main(["logs", "tail", "--logs", str(logs)]) == 0
    assert "error" not in capsys.readouterr().err


def test_a_missing_run_and_a_missing_folder_are_one_line(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["tail", "nobody"], ["recover", "nobody"], ["ls", "--logs", str(logs / "none")]):
        where = [] if "--logs" in arguments else ["--logs", str(logs)]
        assert main(["logs", *arguments, *where]) == RunLogError.exit_code
        assert len(capsys.readouterr().err.splitlines()) == 1
