"""What boards are installed from: locks, the addresses beside them, and the folder that wheels are fetched to."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ANSIBLE = Path(__file__).parents[2] / "ansible"
LOCKS = sorted((ANSIBLE / "roles/jetson_runtime/files/locks").glob("*.txt"))
LINE = re.compile(r"[a-z0-9-]+==[^ ]+ --hash=sha256:[0-9a-f]{64}")


@pytest.fixture(scope="module")
def wheelhouse() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheelhouse", ANSIBLE / "files/wheelhouse.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree as ours is, with one file in each package."""
    for package in ("testbed", "bs_node", "jetson_node", "firmware_setup"):
        (tmp_path / "source" / package).mkdir(parents=True)
        (tmp_path / "source" / package / "__init__.py").write_text("")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (tmp_path / "source" / name).write_text(name)
    return tmp_path / "source"


def identity(lock: Path, source: Path) -> str:
    argv = [sys.executable, str(ANSIBLE / "files/wheelhouse.py"), str(lock), str(source.parent / "cache"), str(source)]
    said = subprocess.run([*argv, "--only-identity"], check=True, capture_output=True, text=True).stdout
    return str(json.loads(said)["identity"])


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_wheel_of_a_lock_has_a_version_and_a_sha256(lock: Path) -> None:
    wheels = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    assert len(wheels) > 10
    assert [line for line in wheels if not LINE.fullmatch(line)] == []
    assert len({line.split("==")[0] for line in wheels}) == len(wheels)


def test_there_is_a_lock_for_every_l4t_and_an_address_only_for_what_its_lock_has() -> None:
    yaml = pytest.importorskip("yaml")
    builds = yaml.safe_load((ANSIBLE / "roles/jetson_runtime/defaults/main.yml").read_text())["jetson_runtime_builds"]
    for build in builds.values():
        lock = (ANSIBLE / "roles/jetson_runtime/files/locks" / f"{build['lock']}.txt").read_text()
        for wheel, url in build.get("urls", {}).items():
            assert f"\n{wheel} --hash=" in lock
            assert url.startswith("https://")
            assert "torch==" in lock


def test_an_address_keeps_the_locks_sha256(wheelhouse: ModuleType) -> None:
    line = "torch==2.8.0 --hash=sha256:" + 64 * "a"
    urls = {"torch==2.8.0": "https://example.org/torch.whl"}
    assert wheelhouse.as_url(line, urls) == f"torch @ https://example.org/torch.whl --hash=sha256:{64 * 'a'}"
    assert wheelhouse.as_url(line, {}) == line


def test_a_board_is_installed_anew_exactly_when_its_lock_or_our_code_changed(source: Path) -> None:
    lock = source.parent / "cpu-cp311-x86_64.txt"
    lock.write_text("numpy==2.4.6 --hash=sha256:00\n")
    first = identity(lock, source)
    (source / "testbed" / "__pycache__").mkdir()
    (source / "testbed" / "__pycache__" / "a.pyc").write_text("compiled")
    (source / "tests").mkdir()
    (source / "tests" / "test_a.py").write_text("")
    assert identity(lock, source) == first
    (source / "testbed" / "a.py").write_text("")
    second = identity(lock, source)
    lock.write_text("numpy==2.4.7 --hash=sha256:00\n")
    third = identity(lock, source)
    assert len({first, second, third}) == 3
    assert not (source.parent / "cache").exists()


def test_a_wheel_that_cannot_be_had_is_one_line_and_no_success(source: Path) -> None:
    lock = source.parent / "cpu-cp311-x86_64.txt"
    lock.write_text(f"numpy==0.0.0 --hash=sha256:{64 * '0'}\n")
    argv = [sys.executable, str(ANSIBLE / "files/wheelhouse.py"), str(lock), str(source.parent / "cache"), str(source)]
    env = {"PIP_NO_INDEX": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(argv, check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_no_index_is_asked_where_every_wheel_is_there_and_a_damaged_one_is_fetched_again(
    wheelhouse: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, lock = tmp_path / "numpy-2.4.6-cp311.whl", tmp_path / "cpu-cp311-x86_64.txt"
    wheel.write_bytes(b"a wheel")
    lock.write_text(f"numpy==2.4.6 --hash=sha256:{hashlib.sha256(b'a wheel').hexdigest()}\n")
    asked: list[str] = []
    monkeypatch.setattr(wheelhouse, "pip", lambda *arguments: asked.append(arguments[0]))
    wheelhouse.fetch(lock, {}, lock.stem, tmp_path)
    assert asked == []
    wheel.write_bytes(b"half a whe")
    wheelhouse.fetch(lock, {}, lock.stem, tmp_path)
    assert asked == ["download"]
    assert not wheel.exists()
