"""A split that ends in its middle: by an exception, by a kill, by a full disk. Started again, it goes on."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import tiny_model

from testbed.checkpoint import partial
from testbed.checkpoint.job import Source, SplitJob
from testbed.checkpoint.manifest import Manifest, load_manifest, shard_name, verify_file
from testbed.checkpoint.partial import JOURNAL_NAME
from testbed.checkpoint.split import run_split, split
from testbed.errors import CheckpointError

pytestmark = pytest.mark.torch
DEVICES = ("near", "far")
STEPS = 16 + 17  # experts of two layers, and what stays at the base station
CHILD = """
import os, signal, sys
from testbed.checkpoint import partial
from testbed.checkpoint.split import run_split, split
partial.KEEP_EVERY_BYTES = 1
steps = iter(range(10**6))
def progress(done, total):
    if next(steps) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
split(sys.argv[1], sys.argv[2], ["near", "far"], progress=progress)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "mixtral"
    tiny_model("mixtral", num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return split(checkpoint, tmp_path_factory.mktemp("whole") / "out", DEVICES)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal is written after every tensor."""
    monkeypatch.setattr(partial, "KEEP_EVERY_BYTES", 1)


def interrupted_at(step: int, checkpoint: Path, out: Path) -> None:
    calls = iter(range(step + 1))

    def interrupt(done: int, total: int) -> None:
        if next(calls) == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(checkpoint, out, DEVICES, progress=interrupt)


def gone_on_with(checkpoint: Path, out: Path) -> list[int]:
    """Bytes told after each step of the rest; the split is whole then."""
    told: list[int] = []
    manifest = split(checkpoint, out, DEVICES, progress=lambda done, _: told.append(done))
    for name in manifest.files:
        verify_file(out, name, manifest)
    assert sorted(path.name for path in out.iterdir()) == sorted([*manifest.files, "manifest.json"])
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return told


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("step", [0, 1, 16, 20, STEPS - 1])
def test_a_split_interrupted_at_any_step_goes_on_and_becomes_the_same(
    step: int, checkpoint: Path, whole: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted_at(step, checkpoint, out)
    assert not out.exists()
    assert len(gone_on_with(checkpoint, out)) <= STEPS - step + 1
    assert load_manifest(out) == whole


def test_a_split_that_was_killed_goes_on(checkpoint: Path, whole: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", CHILD, str(checkpoint), str(out), "20"]
    assert subprocess.run(arguments, check=False, timeout=100).returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(gone_on_with(checkpoint, out)) <= STEPS - 19
    assert load_manifest(out) == whole


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("name", [shard_name("far"), "bs.safetensors", JOURNAL_NAME])
def test_what_was_begun_and_damaged_since_is_written_anew(
    name: str, checkpoint: Path, whole: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted_at(25, checkpoint, out)
    path = tmp_path / ".out.partial" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 1
    path.write_bytes(raw[:-1] if name == JOURNAL_NAME else raw)
    assert len(gone_on_with(checkpoint, out)) == STEPS
    assert load_manifest(out) == whole


@pytest.mark.usefixtures("often")
def test_what_another_split_had_begun_is_not_gone_on_with(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted_at(25, checkpoint, out)
    manifest = split(checkpoint, out, ["one"])
    for name in manifest.files:
        verify_file(out, name, manifest)


@pytest.mark.usefixtures("often")
def test_a_model_that_changed_meanwhile_is_split_from_its_beginning(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted_at(25, checkpoint, out)
    weights = checkpoint / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert len(gone_on_with(checkpoint, out)) == STEPS
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_two_splits_of_one_name_do_not_disturb_each_other(checkpoint: Path, whole: Manifest, tmp_path: Path) -> None:
    jobs = [SplitJob.of(Source.of(checkpoint), DEVICES) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(run_split, job, tmp_path / "out") for job in jobs]
    assert [one.result() for one in both] == [whole, whole]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(CheckpointError, match=r"takes 0.00 GB, 0.00 GB more than is free; free some space"):
        split(checkpoint, tmp_path / "out", DEVICES)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"no tmpfs here: {done.stderr.decode()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
@pytest.mark.usefixtures("often")
def test_a_disk_that_fills_up_is_told_in_a_line_and_the_split_goes_on_once_there_is_room(
    checkpoint: Path, whole: Manifest, small_disk: Path
) -> None:
    old = small_disk / "old"
    split(checkpoint, old, ["one"])
    calls = iter(range(1000))

    def fill(done: int, total: int) -> None:
        if next(calls) == 20:
            (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))

    with pytest.raises(CheckpointError, match=r"out: No space left on device; free some space .* goes on") as caught:
        split(checkpoint, small_disk / "out", DEVICES, progress=fill)
    assert "\n" not in str(caught.value)
    assert not (small_disk / "out").exists()
    split(checkpoint, old, ["one"])  # the other one is still whole
    (small_disk / "filler").unlink()
    told: list[int] = []
    assert split(checkpoint, small_disk / "out", DEVICES, progress=lambda done, _: told.append(done)) == whole
    assert len(told) < STEPS - 10
