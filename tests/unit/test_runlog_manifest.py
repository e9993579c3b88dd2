from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from testbed.errors import RunLogError
from testbed.runlog import manifest
from testbed.runlog.manifest import environment, new_run_directory, write_config, write_manifest
from testbed.runlog.reader import read_manifest
from testbed.runlog.schema import SCHEMA_VERSION


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    noon = time.struct_time((2025, 3, 1, 12, 0, 7, 5, 60, 0))
    monkeypatch.setattr(time, "gmtime", lambda: noon)


def test_a_run_is_named_by_time_and_name_and_never_overwrites_another(tmp_path: Path, stopped_clock: None) -> None:
    names = [new_run_directory(tmp_path / "logs", "local").name for _ in range(3)]
    assert names == ["20250301-120007-local", "20250301-120007-local-02", "20250301-120007-local-03"]


@pytest.mark.parametrize("name", ["", "../up", "a b", "a/b", ".hidden", "x" * 65])
def test_a_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunLogError, match="run name"):
        new_run_directory(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_logs_folder_that_is_a_file_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "logs").write_text("")
    with pytest.raises(RunLogError, match="choose another"):
        new_run_directory(tmp_path / "logs" / below, "local")


def test_the_manifest_is_read_back_and_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tmp_path, {"seed": 1, "machine": environment()})
    assert read_manifest(tmp_path)["seed"] == 1

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            write_manifest(tmp_path, {"seed": 2})
    assert read_manifest(tmp_path)["seed"] == 1
    write_manifest(tmp_path, {"seed": 2})
    assert read_manifest(tmp_path) == {"schema": SCHEMA_VERSION, "seed": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("content", [None, "", "[1]", "{"])
def test_a_manifest_that_is_missing_or_broken_is_one_clear_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunLogError, match=r"manifest\.json"):
        read_manifest(tmp_path)


def test_the_run_file_is_kept_as_it_was_given(tmp_path: Path) -> None:
    text = "# a comment\nseed = 1\n"
    assert write_config(tmp_path, text).read_text() == text


def test_the_environment_tells_machine_and_versions() -> None:
    told = environment(libzmq="4.3.5")
    assert told["packages"]["libzmq"] == "4.3.5"
    assert told["packages"]["numpy"]
    assert told["cpus"] >= 1
    assert told["memory_bytes"] > 0


def test_the_run_log_loads_neither_torch_nor_zmq() -> None:
    program = (
        "import sys, testbed.runlog.recorder, testbed.runlog.manifest as m; m.environment();"
        "sys.exit(bool({'torch', 'zmq', 'transformers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_a_program_outside_a_checkout_has_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "CHECKOUT", tmp_path)
    assert environment()["git"] is None


def test_changed_files_show_in_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, timeout=60)

    monkeypatch.setattr(manifest, "CHECKOUT", tmp_path)
    git("init")
    assert environment()["git"] is None
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-m", "first")
    clean = environment()["git"]
    (tmp_path / "file").write_text("b")
    assert len(clean) == 40
    assert environment()["git"] == clean + "+"


def test_the_manifest_of_a_newer_program_is_refused_in_one_line(tmp_path: Path) -> None:
    write_manifest(tmp_path, {"schema": SCHEMA_VERSION + 1})
    with pytest.raises(RunLogError, match="update the testbed") as refused:
        read_manifest(tmp_path)
    assert "\n" not in str(refused.value)
