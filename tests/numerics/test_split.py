# ruff: noqa: E402 - what is imported below needs what importorskip has just found
from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import tiny_model
from safetensors.torch import load_file, save_file

from bs_node.model import experts_of, load_bs_model, plain_model
from testbed.checkpoint import check
from testbed.checkpoint.ffn_torch import ffn_torch
from testbed.checkpoint.manifest import BS_NAME, load_manifest, shard_name
from testbed.checkpoint.split import split
from testbed.checkpoint.stored_formats import format_of
from testbed.checkpoint.tensor_files import INDEX_NAME
from testbed.errors import CheckpointError, WdmoeError

pytestmark = pytest.mark.torch
DEVICES = ("near", "far")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "mixtral"
    tiny_model("mixtral", num_hidden_layers=2).save_pretrained(folder)
    return folder


@pytest.fixture
def model_dir(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def refuse(model_dir: Path, out: Path, words: str, **options: Any) -> None:
    """The split is refused in one line, and nothing is left behind."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(WdmoeError, match=words) as caught:
        split(model_dir, out, DEVICES, **options)
    assert "\n" not in str(caught.value)
    assert sorted(out.parent.rglob("*")) == before


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_shards_hold_the_experts_and_the_base_station_everything_else(checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = split(checkpoint, tmp_path / "out", DEVICES, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    written = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert seen[-1] == (sum(written), sum(written))
    assert load_manifest(tmp_path / "out") == manifest
    assert [(layer.experts, layer.top_k) for layer in manifest.layers] == [(8, 2)] * 2
    assert set(manifest.files) >= {"config.json", BS_NAME, "node-near.safetensors", "node-far.safetensors"}
    far = load_file(tmp_path / "out" / shard_name("far"))
    assert set(far) == {f"{layer}.{e}.{part}" for layer in (0, 1) for e in (1, 3, 5, 7) for part in ("gate_up", "down")}
    source = load_file(checkpoint / "model.safetensors")
    expert = "model.layers.1.block_sparse_moe.experts.3"
    assert torch.equal(far["1.3.down"], source[f"{expert}.w2.weight"])
    assert torch.equal(far["1.3.gate_up"], torch.cat([source[f"{expert}.w1.weight"], source[f"{expert}.w3.weight"]]))
    assert not [name for name in load_file(tmp_path / "out" / BS_NAME) if ".experts." in name]


def test_the_base_stations_model_equals_the_plain_one_in_every_tensor_that_it_has(
    checkpoint: Path, tmp_path: Path
) -> None:
    manifest = split(checkpoint, tmp_path / "out", DEVICES)
    for dtype in ("float32", "bfloat16"):
        model, plain = load_bs_model(tmp_path / "out", manifest, dtype, "eager"), plain_model(checkpoint, dtype)
        theirs = dict((*plain.named_parameters(), *plain.named_buffers()))
        ours = dict((*model.named_parameters(), *model.named_buffers()))
        assert set(theirs) - set(ours) == {n for n in theirs if ".experts." in n}
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype
            assert torch.equal(tensor, theirs[name])
        assert all(not list(experts.parameters()) for experts in experts_of(model).values())


def test_the_model_hash_names_the_model_and_not_its_placement(checkpoint: Path, tmp_path: Path) -> None:
    two = split(checkpoint, tmp_path / "two", DEVICES)
    three = split(checkpoint, tmp_path / "three", ["a", "b", "c"], placement={"a": range(8), "b": [0], "c": [7]})
    half = split(checkpoint, tmp_path / "half", DEVICES, dtype="float16")
    assert two.model_hash == three.model_hash
    assert three.placement[0][0] == ("a", "b")
    assert half.model_hash != two.model_hash
    assert half.dtype == "float16"


def test_a_split_that_is_there_already_is_checked_and_kept(checkpoint: Path, tmp_path: Path) -> None:
    manifest = split(checkpoint, tmp_path / "out", DEVICES)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert split(checkpoint, tmp_path / "out", DEVICES) == manifest
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps


def test_a_flipped_bit_in_a_kept_split_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    split(checkpoint, tmp_path / "out", DEVICES)
    shard = tmp_path / "out" / shard_name("far")
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 16
    shard.write_bytes(raw)
    refuse(checkpoint, tmp_path / "out", r"node-far.safetensors: sha256")


def test_a_flipped_bit_in_the_base_stations_part_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    manifest = split(checkpoint, tmp_path / "out", DEVICES)
    raw = bytearray((tmp_path / "out" / BS_NAME).read_bytes())
    raw[-5] ^= 16
    (tmp_path / "out" / BS_NAME).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"bs.safetensors: sha256"):
        load_bs_model(tmp_path / "out", manifest, "float32", "eager")


def test_a_folder_that_holds_something_else_is_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    split(checkpoint, out, DEVICES)
    refuse(checkpoint, out, "holds another model or placement", placement={"near": range(8), "far": [0]})
    refuse(checkpoint, out, "holds another model or placement", dtype="float16")
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    refuse(checkpoint, other, r"manifest.json")
    refuse(checkpoint, other / "letter.txt", "letter.txt: is a file; name a folder")


def test_what_is_no_checkpoint_is_refused(model_dir: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", tmp_path / "out", "no config.json")
    refuse(model_dir, tmp_path / "out", "dtype 'int4'", dtype="int4")
    edit_config(model_dir, model_type="unheard_of", architectures=[])
    refuse(model_dir, tmp_path / "out", "transformers cannot read this config")
    (model_dir / "config.json").write_text("{")
    refuse(model_dir, tmp_path / "out", "transformers cannot read this config")


@pytest.mark.parametrize(("model_type", "words"), [("llama", "llama has no experts"), ("vit", "not a causal language")])
def test_a_model_without_experts_is_refused(model_type: str, words: str, model_dir: Path, tmp_path: Path) -> None:
    edit_config(model_dir, model_type=model_type, architectures=[])
    refuse(model_dir, tmp_path / "out", words)


def test_a_tensor_without_a_place_is_refused_by_name(model_dir: Path, tmp_path: Path) -> None:
    edit_weights(model_dir, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.zeros(2)}))
    refuse(model_dir, tmp_path / "out", r"model.layers.0.extra.weight.* no place for")


@pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.block_sparse_moe.experts.3.w3.weight"])
def test_a_missing_tensor_is_refused(missing: str, model_dir: Path, tmp_path: Path) -> None:
    edit_weights(model_dir, lambda tensors: tensors.pop(missing))
    refuse(model_dir, tmp_path / "out", "model.norm.weight: tensors missing|experts.3.*is a tensor missing")


def test_an_expert_that_is_missing_or_of_another_size_is_refused(model_dir: Path, tmp_path: Path) -> None:
    expert = "model.layers.1.block_sparse_moe.experts.3"
    edit_weights(model_dir, lambda tensors: tensors.update({f"{expert}.w2.weight": torch.zeros(64, 90)}))
    refuse(model_dir, tmp_path / "out", r"down_proj is \[64, 90\] where config.json says \[64, 96\]")
    edit_weights(model_dir, lambda tensors: [tensors.pop(f"{expert}.{w}.weight") for w in ("w1", "w2", "w3")])
    refuse(model_dir, tmp_path / "out", r"config.json says 8 experts, the files hold 7 \(0 to 7\)")


@pytest.mark.parametrize("stacked", [False, True], ids=["one entry per expert", "stacked"])
@pytest.mark.parametrize("said", [4, 12])
def test_a_config_that_lies_about_the_number_of_experts_is_refused(said: int, stacked: bool, tmp_path: Path) -> None:
    tiny_model("mixtral", num_hidden_layers=1).save_pretrained(tmp_path / "model", save_original_format=not stacked)
    edit_config(tmp_path / "model", num_local_experts=said)
    refuse(tmp_path / "model", tmp_path / "out", r"config.json says (\[?)" + str(said))


def test_a_config_with_more_experts_than_a_split_can_name_is_refused(model_dir: Path, tmp_path: Path) -> None:
    edit_config(model_dir, num_local_experts=100_000)
    refuse(model_dir, tmp_path / "out", "config.json: experts 100000")
    edit_config(model_dir, num_local_experts=8, num_experts_per_tok=9)
    refuse(model_dir, tmp_path / "out", "a gate that picks 9 of 8 experts")
    edit_config(model_dir, num_local_experts="eight")
    refuse(model_dir, tmp_path / "out", "config")


def test_nodes_may_store_their_experts_in_different_formats(checkpoint: Path, tmp_path: Path) -> None:
    plain = split(checkpoint, tmp_path / "plain", DEVICES)
    manifest = split(checkpoint, tmp_path / "out", DEVICES, weight_formats={"far": "int8"})
    assert (format_of(manifest, "near"), format_of(manifest, "far")) == ("float32", "int8")
    assert manifest.model_hash == plain.model_hash
    assert manifest.files[shard_name("near")] == plain.files[shard_name("near")]
    far = load_file(tmp_path / "out" / shard_name("far"))
    assert far["1.3.down"].dtype == torch.int8
    wide = load_file(tmp_path / "plain" / shard_name("far"))["1.3.down"]
    back = far["1.3.down"][:, : wide.shape[1]] * far["1.3.down_scale"][:, None]
    assert (back - wide).abs().max() <= far["1.3.down_scale"].max() * 0.51
    refuse(checkpoint, tmp_path / "other", "weight format 'int3'", weight_formats={"far": "int3"})


def test_every_layer_may_be_placed_by_itself(checkpoint: Path, tmp_path: Path) -> None:
    placement = {"near": [[0, 1], [6, 7]], "far": [range(2, 8), range(6)]}
    manifest = split(checkpoint, tmp_path / "out", DEVICES, placement=placement)
    assert manifest.held_counts("near") == [2, 2]
    assert {"0.1.down", "1.7.down"} <= set(load_file(tmp_path / "out" / shard_name("near")))


def test_weights_in_other_formats_or_incomplete_are_refused(model_dir: Path, tmp_path: Path) -> None:
    weights = model_dir / "model.safetensors"
    (model_dir / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "model-00002-of-00002.safetensors"}}))
    refuse(model_dir, tmp_path / "out", "model-00002-of-00002.safetensors is missing")
    (model_dir / INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    (tmp_path / "other.safetensors").write_bytes(b"")
    refuse(model_dir, tmp_path / "out", "other.safetensors is missing")
    (model_dir / INDEX_NAME).write_text("[]")
    refuse(model_dir, tmp_path / "out", "not an index")
    (model_dir / INDEX_NAME).unlink()
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(model_dir, tmp_path / "out", r"model.safetensors.*download it again")
    weights.rename(model_dir / "pytorch_model.bin")
    refuse(model_dir, tmp_path / "out", r"model.safetensors is missing; safetensors")


def test_a_checkpoint_that_cannot_be_dequantised_is_refused(model_dir: Path, tmp_path: Path) -> None:
    edit_config(model_dir, quantization_config={"quant_method": "awq", "bits": 4})
    refuse(model_dir, tmp_path / "out", "quantised with awq")
    edit_config(model_dir, quantization_config={"quant_method": "homemade"})
    refuse(model_dir, tmp_path / "out", "quantised with homemade")


def test_a_family_that_computes_something_else_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "ffn_torch", lambda *args: ffn_torch(*args) * 1.001)
    refuse(checkpoint, tmp_path / "out", "MixtralExperts computes something else")
