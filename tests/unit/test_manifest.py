from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from splits import write_split

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    load_manifest,
    manifest_hash,
    shard_name,
    verify_file,
)
from testbed.errors import CheckpointError

SPEC = FfnSpec(width=8, inner=12)


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    manifest, _ = write_split(tmp_path, SPEC)
    assert load_manifest(tmp_path) == manifest


def test_the_hash_depends_on_content_and_not_on_how_the_json_is_laid_out(tmp_path: Path) -> None:
    manifest, _ = write_split(tmp_path, SPEC)
    document = json.loads((tmp_path / MANIFEST_NAME).read_text())
    reordered = json.dumps(dict(reversed(document.items())), indent=7)
    (tmp_path / MANIFEST_NAME).write_text(reordered)
    assert manifest_hash(load_manifest(tmp_path)) == manifest_hash(manifest)
    renamed = manifest.model_copy(update={"model_name": "another"})
    assert manifest_hash(renamed) != manifest_hash(manifest)


def test_holders_are_told_per_device_and_per_layer(tmp_path: Path) -> None:
    manifest, _ = write_split(tmp_path, SPEC, mapping={"near": [0, 1, 2], "far": [2, 3]})
    assert list(manifest.held_by("far")) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    assert manifest.held_counts("near") == [3, 3]
    np.testing.assert_array_equal(manifest.holds_NE(1), [[1, 1, 1, 0], [0, 0, 1, 1]])
    assert manifest.layer_at("l.1.experts").index == 1
    with pytest.raises(CheckpointError, match="no experts at nowhere"):
        manifest.layer_at("nowhere")


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("format", value=2), "format"),
        (put("surprise", value=1), "surprise: Extra inputs"),
        (put("model_hash", value="xyz"), "model_hash"),
        (put("devices", 0, value="../../etc"), "devices.0"),
        (put("files", "../evil", value={"sha256": "0" * 64, "bytes": 1}), r"files.*evil"),
        (put("placement", 0, 0, value=[]), "without device"),
        (put("placement", 0, 0, value=["stranger"]), "unknown device"),
        (put("placement", 0, value=[["near"]]), "every expert of every layer"),
        (put("layers", 1, "index", value=5), "numbered"),
        (put("layers", 0, "spec", "act", value="exec"), "layers.0.spec.act"),
        (put("layers", 0, "spec", "limit", value=-1.0), "layers.0.spec.limit"),
        (put("files", value={}), "no sha256 for bs.safetensors"),
    ],
)
def test_a_manifest_that_breaks_the_format_is_refused_where_it_does(
    tmp_path: Path, change: Callable[[Any], None], words: str
) -> None:
    write_split(tmp_path, SPEC)
    document = json.loads((tmp_path / MANIFEST_NAME).read_text())
    change(document)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@given(junk=st.one_of(st.binary(max_size=200), st.text(max_size=50).map(lambda t: json.dumps(t).encode())))
def test_bytes_that_are_no_manifest_raise_nothing_but_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    (folder / MANIFEST_NAME).write_bytes(junk)
    with pytest.raises(CheckpointError):
        load_manifest(folder)


def test_a_folder_without_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"manifest.json: No such file.*split the model"):
        load_manifest(tmp_path)


def test_one_flipped_bit_in_a_shard_is_refused_by_name(tmp_path: Path) -> None:
    manifest, _ = write_split(tmp_path, SPEC)
    path = verify_file(tmp_path, shard_name("far"), manifest)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    verify_file(tmp_path, shard_name("near"), manifest)
    with pytest.raises(CheckpointError, match=r"node-far.safetensors: sha256 .* copy it again"):
        verify_file(tmp_path, shard_name("far"), manifest)


@pytest.mark.parametrize(
    ("name", "words"), [("node-far.safetensors", "copy it again"), ("node-x.safetensors", "names no")]
)
def test_a_file_that_is_missing_or_not_of_the_split_is_refused_by_name(tmp_path: Path, name: str, words: str) -> None:
    manifest, _ = write_split(tmp_path, SPEC)
    (tmp_path / "node-far.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{name}.*{words}"):
        verify_file(tmp_path, name, manifest)


def test_a_manifest_cannot_be_changed_once_made(tmp_path: Path) -> None:
    manifest, _ = write_split(tmp_path, SPEC)
    with pytest.raises(ValueError, match="frozen"):
        manifest.model_name = "x"
    assert isinstance(manifest, Manifest)
