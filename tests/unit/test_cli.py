from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from testbed.cli import main, output
from testbed.errors import NodeError

HEAVY = ["torch", "transformers", "numba", "numpy", "pyarrow", "zmq", "rich", "psutil"]
LEAST = 'name = "small"\n[[device]]\nname = "jetson-0"\n[[policy]]\nname = "topk"\n'


def run_testbed(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from testbed.cli import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: object) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def run_raises(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> None:
    def run_experiment(*_: object, **__: object) -> None:
        raise raised

    stand_in(monkeypatch, "testbed.experiment.run", run_experiment=run_experiment)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(LEAST)
    return file


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["doctor", "--help"], []])
def test_help_answers_without_loading_anything_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from testbed.cli import main; code = main(sys.argv[1:]); "
        f"print('LOADED', *[name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "Usage: testbed" in done.stdout
    assert "Example: testbed" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("testbed 0.")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing argument 'FILE'"),
        (["run", "x.toml", "--jsn"], "--jsn"),
        (["rum"], "No such command 'rum'"),
        (["doctor", "a", "b"], "unexpected extra argument"),
    ],
)
def test_a_mistyped_command_line_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    assert told.startswith("error: ")
    assert said in told
    assert "--help" in told


def test_a_missing_run_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_testbed("run", str(tmp_path / "none.toml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}/none.toml: no such file; name an existing run file\n"


def test_an_unknown_key_is_one_line_and_exit_code_2(run_file: Path) -> None:
    run_file.write_text(LEAST + "[wire]\ndwn = 'int8'\n")
    done = run_testbed("run", str(run_file))
    assert done.returncode == 2
    assert done.stderr == f'error: {run_file}: wire.dwn: unknown key; did you mean "down"?\n'


def test_a_traceback_is_shown_only_where_it_is_asked_for(tmp_path: Path) -> None:
    done = run_testbed("run", str(tmp_path / "none.toml"), TESTBED_TRACEBACK="1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


def test_run_hands_its_options_on_and_prints_the_table(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, object] = {}

    def run_experiment(config: object, **options: object) -> SimpleNamespace:
        asked.update(options, config=config)
        return SimpleNamespace(perplexity="3.14", document=lambda: {"rows": [float("nan")]})

    def results_table(results: SimpleNamespace) -> object:
        return output.table("Results", ["policy", "perplexity"], [["topk", results.perplexity]])

    stand_in(monkeypatch, "testbed.experiment.run", run_experiment=run_experiment)
    stand_in(
        monkeypatch,
        "testbed.experiment.table",
        **{"results_table": results_table, "results_notes": lambda _: ["log: [x]/y"]},
        **{"placements_table": None, "placements_notes": None},
    )
    assert main(["run", str(run_file), "--out", str(tmp_path / "log"), "--insecure"]) == 0
    assert (asked["config_path"], asked["out"], asked["insecure"]) == (run_file, tmp_path / "log", True)
    told = capsys.readouterr().out
    assert "3.14" in told
    assert "log: " in told
    assert main(["run", str(run_file), "--json"]) == 0
    assert (asked["out"], asked["insecure"]) == (None, False)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"rows": [None]}


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (NodeError("jetson-3 did not join;\nlook at its log"), 5, "error: jetson-3 did not join; look at its log\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(28, "No space left on device", "/logs"), 1, "error: [Errno 28] No space left on device: '/logs'; "),
        (ModuleNotFoundError("no torch", name="torch"), 1, "error: torch is not installed: pip install"),
    ],
)
def test_what_ends_a_run_becomes_one_line_and_its_exit_code(
    raised: BaseException, code: int, said: str, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        run_raises(monkeypatch, raised)
        assert main(["run", str(run_file)]) == code
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert len(told.splitlines()) == 1


def test_a_fault_of_the_program_itself_keeps_its_traceback(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_raises(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["run", str(run_file)])


def test_node_hands_every_argument_on_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[list[str]] = []

    def node_main(argv: list[str]) -> int:
        received.append(argv)
        return 4

    stand_in(monkeypatch, "jetson_node.__main__", main=node_main)
    arguments = ["--name", "jetson-0", "--threads=2", "-x", "--help", "rest", "--version"]
    assert main(["node", *arguments]) == 4
    assert received == [arguments]


def test_a_json_line_is_one_line_with_null_for_the_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json_line({"rows": [{"cut": float("nan"), "policy": "a\nb"}, (1, 2)]})
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    assert json.loads(told) == {"rows": [{"cut": None, "policy": "a\nb"}, [1, 2]]}
    with pytest.raises(ValueError, match="Out of range"):
        output.print_json_line({"cut": float("inf")})


def test_a_table_in_a_pipe_is_neither_coloured_nor_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    columns = ["policy", *(f"a column of some width {n}" for n in range(5))]
    output.console().print(output.table("Results", columns, [["wlr θ=0.1", *"12345"]]))
    assert "\x1b" not in pipe.getvalue()
    assert all(column in pipe.getvalue() for column in columns)
