"""`testbed generate` and `testbed chat` as a user types them."""

from __future__ import annotations

import json
import os
import pty
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from processes import TESTBED, Log, run, run_file, started

from testbed.runlog.catalog import State, describe_run
from testbed.runlog.reader import read_manifest

pytestmark = [pytest.mark.torch]

SETTING = """
[timeouts]  # of a machine that is busy with other things
silence_s = 60.0
reply_s = 60.0
join_s = 90.0
"""
WLR = 'name = "wlr"\ntheta = 0.1'


def reading(source: str, *options: str) -> list[str]:
    """The command with its standard input from there."""
    return ["sh", "-c", 'from=$1; shift; exec "$@" < "$from"', "sh", source, TESTBED, *options]


def generated(folder: Path, *options: str, text: str = SETTING, device: str = "") -> dict[str, Any]:
    file = run_file(folder, text, devices=[device] * 4, policies=['name = "topk"', WLR])
    done = run([TESTBED, "generate", str(file), "--json", *options], folder, 90)
    assert (done.returncode, done.stderr) == (0, "")
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def test_prompts_are_continued_timed_and_logged(tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text('{"prompt": "import os\\nimport "}\n')
    asked = ["--prompt", "def main(", "--prompts", str(more), "--max-new-tokens", "6", "--policy", "wlr:theta=0.2"]
    document = generated(tmp_path, *asked)
    assert [answer["prompt"] for answer in document["answers"]] == ["def main(", "import os\nimport "]
    for answer in document["answers"]:
        assert (len(answer["token_ids"]), len(answer["token_s"]), answer["finish_reason"]) == (6, 5, "length")
        assert answer["first_token_s"] > 0
    assert (document["policy"], document["emulated"], document["tokens"]) == ("wlr θ=0.2", False, 12)
    assert 0 < document["block_p50_s"] <= document["block_p95_s"] < document["first_token_p50_s"]
    run_dir = tmp_path / "logs" / document["run"]
    manifest = read_manifest(run_dir)
    assert manifest["policies"] == ["wlr θ=0.2"]
    assert manifest["text"] == "a user's prompts"
    assert describe_run(run_dir).state is State.FINISHED


def test_what_a_user_embeds_is_continued_alike_and_the_log_says_so(tmp_path: Path) -> None:
    document = generated(tmp_path, "--prompt", "def main(", "--max-new-tokens", "4", "--embed-locally")
    assert document["answers"][0]["text"].startswith("self):\n")
    assert "ids were not sent" in read_manifest(tmp_path / "logs" / document["run"])["text"]


def test_times_over_emulated_devices_are_emulated_and_say_so(tmp_path: Path) -> None:
    stretched = SETTING + "[emulation]\ndecode_dilation = 40.0\n"
    slow = "emulated_flops_per_s = 8.8e8"  # 0.5 ms for a row of the demo model
    asked = ["--prompt", "def main(", "--max-new-tokens", "3"]
    document = generated(tmp_path, *asked, text=stretched, device=slow)
    assert document["emulated"] is True
    rows_s = 0.0005
    assert rows_s <= document["block_p50_s"] < 40 * rows_s, "what it really took is above that"


def test_a_lone_prompt_is_shown_with_its_text_and_what_it_took(tmp_path: Path) -> None:
    file = run_file(tmp_path, SETTING, devices=[""] * 4)
    done = run([TESTBED, "generate", str(file), "--prompt", "def main(", "--max-new-tokens", "4"], tmp_path, 90)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("def main(self):\n")
    assert "4 tokens; first token" in done.stdout


def test_a_node_that_dies_meanwhile_is_named(tmp_path: Path) -> None:
    file = run_file(tmp_path, SETTING, devices=[""] * 4)
    asked = [TESTBED, "generate", str(file), "--json", "--prompt", "import ", "--max-new-tokens", "900"]
    with started(asked, tmp_path) as command:
        log = Log(command, tmp_path / "logs")
        log.wait(lambda: len(log.rows(device=0, phase=1)) > 20, "an answer under way")
        command.node(log.run_dir, "jetson-1").kill()
        done = command.finish(60)
        command.wait_until_nothing_runs()
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["nodes_lost"] == ["jetson-1"]
    assert document["tokens"] == 900


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "name a --prompt to continue"),
        (["--prompt", "x", "--policy", "wlr:tehta=1"], 'did you mean "theta"?'),
        (["--prompt", "x", "--policy", "no good"], "must be a built-in policy"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "x", "--temperature", "0.5", "--seed", "1"], "temperature, seed: without effect"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path: Path, options: list[str], said: str) -> None:
    done = run([TESTBED, "generate", str(run_file(tmp_path, devices=[""] * 2)), *options], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_conversation_from_a_pipe_is_answered_line_by_line(tmp_path: Path) -> None:
    file = run_file(tmp_path, SETTING, devices=[""] * 4)
    lines = tmp_path / "lines.txt"
    lines.write_text("def f(x):\n/new\nimport os")
    done = run(reading(str(lines), "chat", str(file), "--json", "--max-new-tokens", "5"), tmp_path, 90)
    assert done.returncode == 0
    assert "demo model" in done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["finish_reason"] for answer in answers] == ["length", "length"]
    assert all(answer["text"] for answer in answers)


def test_what_a_pipe_asks_and_cannot_be_answered_ends_the_chat_in_one_line(tmp_path: Path) -> None:
    file = run_file(tmp_path, SETTING, devices=[""] * 2)
    lines = tmp_path / "lines.txt"
    lines.write_text("x" * 5000 + "\nimport os\n")
    done = run(reading(str(lines), "chat", str(file), "--max-new-tokens", "5"), tmp_path, 90)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: the model has room for 1024 tokens")
    assert "Traceback" not in done.stderr


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat(tmp_path: Path) -> None:
    file = run_file(tmp_path, SETTING, devices=[""] * 4)
    ours, theirs = pty.openpty()
    try:
        with started(reading(os.ttyname(theirs), "chat", str(file), "--max-new-tokens", "900"), tmp_path) as command:
            log = Log(command, tmp_path / "logs")
            log.wait_for("all_joined")
            os.write(ours, b"import \n")
            log.wait(lambda: len(log.rows(device=0, phase=1)) > 20, "an answer under way")
            command.process.send_signal(signal.SIGINT)
            ended = log.wait_for("generated")
            assert ended["finish_reason"] == "cancelled"
            assert 0 < ended["tokens"] < 900
            os.write(ours, b"\x04")
            done = command.finish(30)
            command.wait_until_nothing_runs()
        assert done.returncode == 0
        assert "Ctrl-C stops an answer" in done.stderr
        assert not list(log.run_dir.glob("*.seg*"))
    finally:
        os.close(ours)
        os.close(theirs)
