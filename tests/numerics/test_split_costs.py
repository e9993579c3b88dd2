"""What `testbed split` says of weight formats: measured here, beside what nodes will hold."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import tiny_model
from typed_commands import typed

from testbed.checkpoint import format_costs
from testbed.checkpoint.ffn import tensor_name
from testbed.checkpoint.format_costs import ERROR_ROWS, FormatSpeed, format_error
from testbed.checkpoint.manifest import load_manifest, shard_name

pytestmark = pytest.mark.torch
EXPERT = 3 * 64 * 96  # weights of one of the tiny model
LAYERS, EXPERTS = 2, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "mixtral"
    tiny_model("mixtral", num_hidden_layers=LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _quick_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 16 rows int8 is the slower one on this machine, int4 never."""

    def speed(_spec: Any, _tensors: Any, fmt: str, rows: Any, **_: Any) -> FormatSpeed:
        return FormatSpeed(tuple(rows), (1.0, 9.0 if fmt == "int8" else 4.0, 30.0), (2.0, 5.0, 40.0))

    monkeypatch.setattr(format_costs, "format_speed", speed)


def nodes_file(folder: Path, *nodes: str) -> Path:
    file = folder / "nodes.toml"
    file.write_text("\n".join(f'[[node]]\nname = "n{number}"\n{node}' for number, node in enumerate(nodes)))
    return file


def told_by(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    out, _ = typed(capsys, *arguments, "--json")
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return document


def test_a_split_measures_its_packed_formats_with_the_checkpoints_own_weights(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = nodes_file(tmp_path, "", 'weight_format = "int4"', 'weight_format = "int8"', 'weight_format = "int8"')
    told = told_by(capsys, "split", checkpoint, "--nodes", nodes, "--out", tmp_path / "out")
    assert [cost["weight_format"] for cost in told["weight_formats"]] == ["int8", "int4"]
    assert told["weight_formats_measured_with"] == "expert 0 of model.layers.0.mlp.experts"

    from safetensors.torch import load_file

    spec = load_manifest(tmp_path / "out").layers[0].spec
    stored = load_file(tmp_path / "out" / shard_name("n0"))
    tensors = {part: stored[tensor_name(0, 0, part)] for part in spec.shapes()}
    x_RD = torch.randn(ERROR_ROWS, spec.width, generator=torch.Generator().manual_seed(0))
    for cost in told["weight_formats"]:
        assert cost["relative_error"] == pytest.approx(format_error(spec, tensors, cost["weight_format"], x_RD))


def test_a_format_that_is_slower_on_this_machine_says_so_and_that_it_is_this_machine(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = nodes_file(tmp_path, 'weight_format = "int8"', 'weight_format = "int4"')
    out, _ = typed(capsys, "split", checkpoint, "--nodes", nodes, "--dry-run")
    assert "of this machine" in out
    assert "not on a board" in out
    assert "random weights" in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["int8"][-1] == "16"
    assert rows["int4"][-1] == "-"


def test_without_a_packed_format_nothing_is_measured(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = nodes_file(tmp_path, "", 'weight_format = "bfloat16"')
    told = told_by(capsys, "split", checkpoint, "--nodes", nodes, "--dry-run")
    assert (told["weight_formats"], told["weight_formats_measured_with"]) == ([], None)
    out, _ = typed(capsys, "split", checkpoint, "--nodes", nodes, "--dry-run")
    assert "Weight formats" not in out


def test_memory_is_planned_for_what_a_node_will_hold(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = 'weight_format = "bfloat16"'
    nodes = nodes_file(
        tmp_path, half, f'{half}\ncomputes_on = "cpu"', 'weight_format = "int8"\ncomputes_on = "numpy"',
        'weight_format = "int8"\ncomputes_on = "cpu"',
    )  # fmt: skip
    told = told_by(capsys, "place", checkpoint, "--nodes", nodes)
    assert [node["weight_format"] for node in told["nodes"]] == ["bfloat16", "bfloat16", "int8", "int8"]
    assert [node["held_as"] for node in told["nodes"]] == ["bfloat16", "float32", "float32", "int8"]
    held = [LAYERS * len(experts) for experts in told["placement"].values()]  # the same in every layer
    needs = [node["needs_bytes"] / (EXPERT * count) for node, count in zip(told["nodes"], held, strict=True)]
    assert needs[:3] == [2, 4, 4]
    assert 1 < needs[3] < 1.4
    out, _ = typed(capsys, "place", checkpoint, "--nodes", nodes)
    assert "stored as" in out
    assert "held as" in out


def test_a_node_without_torch_is_not_given_what_only_its_shard_has_room_for(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gigabytes = 2 * LAYERS * EXPERTS * EXPERT / 1e9  # for all experts in int8, not in float32
    packed = f'memory_gb = {gigabytes}\nweight_format = "int8"'
    typed(capsys, "place", checkpoint, "--nodes", nodes_file(tmp_path, f'{packed}\ncomputes_on = "cpu"'))
    _, said = typed(
        capsys, "place", checkpoint, "--nodes", nodes_file(tmp_path, f'{packed}\ncomputes_on = "numpy"'), code=2
    )
    assert "GB are missing" in said
