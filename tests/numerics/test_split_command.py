"""`testbed split` and `testbed place`, as a user types them."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import tiny_model
from typed_commands import typed

from testbed.checkpoint.manifest import load_manifest, verify_file
from testbed.cli import main

pytestmark = pytest.mark.torch
SAMPLE = Path(__file__).parents[2] / "logs" / "sample"
NODES = """
[[node]]
name = "device-0"
memory_gb = 1
[[node]]
name = "device-1"
memory_gb = 1
weight_format = "int8"
[base_station]
memory_gb = 1
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "mixtral"
    tiny_model("mixtral", num_hidden_layers=4).save_pretrained(folder)
    return folder


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    file = tmp_path / "nodes.toml"
    file.write_text(NODES)
    return file


def test_a_dry_run_says_what_each_node_needs_and_writes_nothing(
    checkpoint: Path, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = typed(capsys, "split", checkpoint, "--nodes", nodes, "--dry-run", "--json")
    told = json.loads(out.splitlines()[-1])
    expert = 3 * 64 * 96
    assert told["nodes"][0]["needs_bytes"] == 4 * 4 * expert * 4
    assert 0.2 < told["nodes"][1]["needs_bytes"] / told["nodes"][0]["needs_bytes"] < 0.35
    assert told["nodes"][0]["memory_bytes"] == 1e9
    assert told["written"] is None
    assert list(nodes.parent.iterdir()) == [nodes]
    out, _ = typed(capsys, "split", checkpoint, "--nodes", nodes, "--dry-run")
    assert "device-1" in out
    assert "base station" in out
    assert "nothing was written" in out


def test_a_dry_run_reads_headers_and_no_weights(
    checkpoint: Path, nodes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from testbed.checkpoint.tensor_files import TensorFiles

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(TensorFiles, "tensor", read)
    monkeypatch.setattr(TensorFiles, "row", read)
    typed(capsys, "split", checkpoint, "--nodes", nodes, "--dry-run")


def test_what_place_writes_split_takes(
    checkpoint: Path, nodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placed, out = tmp_path / "placement.toml", tmp_path / "out"
    told, _ = typed(
        capsys,
        "place",
        checkpoint,
        "--nodes",
        nodes,
        "--usage",
        SAMPLE,
        "--speeds",
        SAMPLE,
        "--by-layer",
        "--out",
        placed,
    )
    assert "usage from" in told
    assert "% less than with expert q on node q mod N" in told
    _, warned = typed(capsys, "split", checkpoint, "--nodes", nodes, "--placement", placed, "--out", out, "--json")
    assert "no tokenizer" in warned
    manifest = load_manifest(out)
    for name in manifest.files:
        verify_file(out, name, manifest)
    assert manifest.weight_format == {"device-1": "int8"}
    assert len(set(manifest.placement)) > 1
    _, refused = typed(capsys, "place", checkpoint, "--nodes", nodes, "--out", placed, code=2)
    assert "is there already" in refused


def test_a_tokenizer_that_is_there_is_not_missed(
    checkpoint: Path, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "tokenizer.json").write_text("{}")
    _, warned = typed(capsys, "split", checkpoint, "--nodes", nodes, "--dry-run")
    (checkpoint / "tokenizer.json").unlink()
    assert warned == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("memory_gb = 1\n[[", "memory_gb = 0.0001\n[["), "node device-0 has 0.00 GB and an expert takes"),
        (("station]\nmemory_gb = 1", "station]\nmemory_gb = 0.0001"), "base_station: needs 0.00 GB and has 0.00"),
        (
            ("memory_gb", "memory_mb"),
            "node.0.memory_mb: Extra inputs are not permitted; known here are name, memory_gb",
        ),
        (('"int8"', '"int3"'), "node.1.weight_format: Input should be"),
        (("device-1", "device-0"), '2 of them are named "device-0"'),
        (("[[node]]", "[[board]]"), "board: Extra inputs are not permitted; known here are [[node]]"),
    ],
)
def test_a_nodes_file_that_cannot_work_is_one_line_and_nothing_is_written(
    change: tuple[str, str], words: str, checkpoint: Path, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes.write_text(NODES.replace(*change))
    out, told = typed(capsys, "split", checkpoint, "--nodes", nodes, "--out", nodes.parent / "out", code=2)
    assert (out, told.count("\n")) == ("", 1)
    assert words in told
    assert list(nodes.parent.iterdir()) == [nodes]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--dry-run"], "nowhere: no such folder, and no name of a model on the hub"),
        (["{model}"], "name the folder to write, --out DIR"),
        (["{model}", "--dry-run", "--dtype", "int8"], "--dtype int8: weights are stored in float32"),
        (["{model}", "--dry-run", "--revision", "main"], "a folder has no --revision"),
        (["{model}", "--dry-run", "--placement", "{nodes}"], "no [placement] in it; write one with `testbed place"),
    ],
)
def test_a_command_line_that_cannot_work_is_one_line(
    arguments: list[str], words: str, checkpoint: Path, nodes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(model=checkpoint, nodes=nodes) for argument in arguments]
    capsys.readouterr()
    assert main(["split", *filled, "--nodes", str(nodes)]) in (2, 3)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert words in told


def test_a_run_of_another_model_or_node_is_refused(
    checkpoint: Path, nodes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("mixtral", num_hidden_layers=2).save_pretrained(tmp_path / "other")
    _, told = typed(capsys, "place", tmp_path / "other", "--nodes", nodes, "--usage", SAMPLE, code=2)
    assert "other layers than the 2 of this one" in told
    nodes.write_text(NODES.replace("device-1", "stranger"))
    _, told = typed(capsys, "place", checkpoint, "--nodes", nodes, "--speeds", SAMPLE, code=2)
    assert "stranger was not measured there, only device-0" in told


def test_a_hub_out_of_reach_is_one_line(nodes: Path, tmp_path: Path) -> None:
    code = "import sys; from testbed.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "split", "nobody/nothing", "--nodes", str(nodes), "--dry-run"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("error: nobody/nothing: the hub is out of reach")
    assert done.stderr.count("\n") == 1
