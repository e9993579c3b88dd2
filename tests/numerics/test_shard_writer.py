# ruff: noqa: E402 - what is imported below needs what importorskip has just found
from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file

from testbed.checkpoint import shard_writer
from testbed.checkpoint.manifest import file_entry
from testbed.checkpoint.shard_writer import Hashing, ShardWriter
from testbed.checkpoint.tensor_files import ONE_FILE, TensorFiles

pytestmark = pytest.mark.torch
TENSORS = {f"{i}.down": torch.arange(3000 * i, dtype=torch.float32).view(30, -1) for i in range(1, 6)}
ENTRIES = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()}


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a file of 180 KB is written in many pieces, sent and dropped many times, with hashing close behind."""
    for name, size in {"PIECE_BYTES": 1000, "WINDOW_BYTES": 8192, "BEHIND_BYTES": 4000}.items():
        monkeypatch.setattr(shard_writer, name, size)


@pytest.mark.usefixtures("small_windows")
def test_a_file_written_in_windows_is_what_safetensors_reads_and_its_hash_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    with Hashing() as hashing:
        writer = ShardWriter(path, ENTRIES, hashing)
        for name, tensor in TENSORS.items():
            writer.add(name, [tensor[:7], tensor[7:]])
        assert writer.finish() == file_entry(path)
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.usefixtures("small_windows")
def test_a_file_that_was_begun_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    path, names = tmp_path / "shard.safetensors", list(TENSORS)
    with Hashing() as hashing:
        writer = ShardWriter(path, ENTRIES, hashing)
        for name in names[:3]:
            writer.add(name, [TENSORS[name]])
        begun = writer.mark()
        writer.add(names[3], [TENSORS[names[3]]])
        writer.close()
        writer = ShardWriter(path, ENTRIES, hashing, begun)
        for name in names[3:]:
            writer.add(name, [TENSORS[name]])
        assert writer.finish() == file_entry(path)
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(path).items())


@pytest.mark.parametrize("padding", range(8))
def test_tensors_of_a_file_are_read_wherever_its_header_ends(padding: int, tmp_path: Path) -> None:
    save_file({"a": torch.arange(5.0), "b": torch.ones(3, 2, dtype=torch.bfloat16)}, tmp_path / ONE_FILE)
    raw = (tmp_path / ONE_FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip() + b" " * padding
    (tmp_path / ONE_FILE).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    files = TensorFiles(tmp_path)
    assert torch.equal(files.tensor("a"), torch.arange(5.0))
    assert torch.equal(files.row("b", 2), torch.ones(2, dtype=torch.bfloat16))


def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"U8","shape":[15000000000000],"data_offsets":[0,15000000000000]}}'
    with (tmp_path / ONE_FILE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + 15 * 10**12)  # full of holes
        except OSError:
            pytest.skip("this file system has no files of 15 TB")
    files = TensorFiles(tmp_path)
    assert files.tensor("a")[-1] == 0
