from __future__ import annotations

import importlib.metadata
import json
import resource
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from testbed.cli import main
from testbed.cli.doctor import examine
from testbed.config import RunConfig
from testbed.health import machine, run_file

Answer = tuple[bool, str]


def config(**sections: object) -> RunConfig:
    least = {"name": "small", "device": [{"name": "jetson-0"}], "policy": [{"name": "topk"}]}
    return RunConfig.model_validate({**least, **sections})


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def whole_base_station(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed differs between machines, and torch is slow to ask: say that all of it is there."""
    monkeypatch.setitem(machine.MACHINE_CHECKS, "packages", lambda: ("ok", "numpy 2.4"))
    monkeypatch.setattr(machine, "base_station", lambda **_: ("ok", "torch 2.13.0"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "moe"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "mixtral"}')
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def write_run_file(folder: Path, checkpoint: Path, more: str = "") -> Path:
    file = folder / "run.toml"
    file.write_text(
        f'name = "small"\n[[device]]\nname = "jetson-0"\n[[policy]]\nname = "topk"\n'
        f'[model]\npath = "{checkpoint}"\n[log]\ndirectory = "{folder}"\n{more}'
    )
    return file


def installed(monkeypatch: pytest.MonkeyPatch, requirements: list[str], versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requirements)
    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.usefixtures("whole_base_station")
def test_a_sound_run_file_gets_a_line_per_check_and_exit_code_0(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_run_file(tmp_path, checkpoint)
    assert main(["doctor", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    checks = [*machine.MACHINE_CHECKS, "base station", "run file", *run_file.RUN_CHECKS]
    assert [line[9:].partition(":")[0] for line in lines[:-1]] == checks
    assert lines[-1].startswith("0 problem(s)")


@pytest.mark.usefixtures("whole_base_station")
def test_a_problem_means_exit_code_1_and_the_other_checks_still_run(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "config.json").unlink()
    assert main(["doctor", str(write_run_file(tmp_path, checkpoint)), "--json"]) == 1
    told = capsys.readouterr().out
    assert told.count("\n") == 1
    document = json.loads(told)
    assert (document["ok"], document["problems"]) == (False, 1)
    assert [finding["check"] for finding in document["findings"] if finding["level"] == "problem"] == ["model"]
    assert document["findings"][-1]["check"] == "open files"


@pytest.mark.usefixtures("whole_base_station")
def test_an_invalid_run_file_is_a_problem_beside_the_machine_s_findings(tmp_path: Path, checkpoint: Path) -> None:
    findings = examine(write_run_file(tmp_path, checkpoint, "[wire]\nupp = 1"))
    assert findings[-1].check == "run file"
    assert findings[-1].level == "problem"
    assert 'wire.upp: unknown key; did you mean "up"?' in findings[-1].text
    assert len(findings) == len(machine.MACHINE_CHECKS) + 2


@pytest.mark.usefixtures("whole_base_station")
def test_a_check_that_breaks_is_a_problem_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> machine.Verdict:
        raise ValueError("several\nlines")

    monkeypatch.setitem(machine.MACHINE_CHECKS, "clock", broken)
    assert ("problem", "clock", "cannot be checked (ValueError: several lines)") in examine(None)


def test_packages_that_are_missing_or_old_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["msgpack>=1.2.1", "numpy<3,>=2.0", "pyzmq>=27", 'tomli>=2; python_version < "3.0"', "typer"]
    installed(monkeypatch, requirements, {"numpy": "1.26.4", "pyzmq": "27.0", "tomli": "2.0", "typer": "0.29"})
    level, text = machine.packages()
    assert level == "problem"
    assert text == "msgpack is missing, numpy 1.26.4 is older than 2.0; pip install --upgrade wdmoe-testbed"


def test_a_machine_without_torch_is_a_node_but_no_base_station(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, ['torch>=2.9; extra == "bs"', "numpy>=2.0"], {"numpy": "2.4"})
    level, text = machine.base_station(needed=False)
    assert level == "warning"
    assert text.startswith("torch is missing; pip install 'wdmoe-testbed[bs]'")
    assert machine.base_station(needed=True)[0] == "problem"


def test_a_torch_that_is_installed_but_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, ['torch>=2.9; extra == "bs"'], {"torch": "2.13.0+cpu"})
    monkeypatch.setattr(machine, "_ask", lambda _: (False, "ImportError: libcudnn.so.9"))
    level, text = machine.base_station(needed=False)
    assert level == "problem"
    assert "does not load (ImportError: libcudnn.so.9); install it again" in text


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((True, "4.3.4 True"), "libzmq 4.3.4 is older than 4.3.5"),
        ((True, "4.3.5 False"), "libzmq 4.3.5 has no CURVE encryption"),
        ((False, "ImportError: no libsodium"), "pyzmq does not load (ImportError: no libsodium)"),
    ],
)
def test_a_zeromq_that_cannot_protect_a_run_is_a_problem(
    answer: Answer, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_ask", lambda _: answer)
    level, text = machine.zeromq()
    assert level == "problem"
    assert said in text
    assert "pip install" in text


def test_this_machine_s_zeromq_is_asked_in_a_process_of_its_own() -> None:
    assert machine.zeromq()[0] == "ok"


def test_a_process_that_dies_without_a_word_is_told_by_its_exit_code() -> None:
    assert machine._ask("import os; os._exit(3)") == (False, "exit code 3")


@pytest.mark.usefixtures("whole_base_station")
def test_a_runtime_folder_that_others_can_open_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "wdmoe-testbed").mkdir(mode=0o755)
    finding = next(finding for finding in examine(None) if finding.check == "folders")
    assert finding.level == "problem"
    assert "chmod 700" in finding.text


def test_a_fixed_port_in_use_is_a_problem_and_a_free_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        level, text = run_file.listen(config(listen={"port": port}))
        assert level == "problem"
        assert text.startswith(f"127.0.0.1:{port}: Address already in use; set listen.port = 0")
    assert run_file.listen(config(listen={"port": port}))[0] == "ok"


def test_an_address_that_is_not_this_machine_s_is_a_problem() -> None:
    level, text = run_file.listen(config(listen={"host": "192.0.2.1"}))
    assert level == "problem"
    assert "192.0.2.1" in text


def test_a_model_folder_without_a_checkpoint_is_a_problem(tmp_path: Path, checkpoint: Path) -> None:
    def said(path: Path) -> str:
        level, text = run_file.model(config(model={"path": str(path)}))
        return f"{level}: {text}"

    assert said(checkpoint) == f"ok: {checkpoint}: mixtral"
    assert "no such folder; set model.path" in said(tmp_path / "none")
    (checkpoint / "model.safetensors").unlink()
    assert "has no *.safetensors file" in said(checkpoint)
    (checkpoint / "config.json").write_text("[1]")
    assert "problem" in said(checkpoint)
    assert "has no readable config.json" in said(checkpoint)


@pytest.mark.usefixtures("whole_base_station")
def test_a_policy_that_does_not_exist_is_a_problem(tmp_path: Path, checkpoint: Path) -> None:
    file = write_run_file(tmp_path, checkpoint, '[[policy]]\nname = "wrl"\ntheta = 0.1\n')
    finding = next(finding for finding in examine(file) if finding.check == "policies")
    assert finding.level == "problem"
    assert '"wlr"' in finding.text


def test_a_log_folder_on_a_full_disk_or_under_a_file_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = config(log={"directory": str(tmp_path / "logs" / "deep")})
    assert run_file.disk(logs)[0] == "ok"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**29))
    assert run_file.disk(logs)[0] == "warning"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**20))
    assert run_file.disk(logs) == ("problem", f"{tmp_path}: 0.0 GiB free; make room or set log.directory")
    (tmp_path / "logs").write_text("a file")
    assert "nothing can be written there; set log.directory" in run_file.disk(logs)[1]


def test_little_memory_and_few_cores_are_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=2**29))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    assert run_file.memory(config())[0] == "warning"
    assert run_file.cores(config()) == (
        "warning",
        "1 for 2 threads: nodes on this machine wait for each other, times include it",
    )


def test_too_few_open_files_is_a_problem_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
    assert run_file.open_files(config()) == ("problem", "at most 64, about 80 needed; ulimit -n 80")


def test_a_slow_clock_source_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.get_clock_info", lambda _: SimpleNamespace(resolution=1e-3))
    assert machine.clock()[0] == "warning"
