"""Quantised checkpoints are split into what their numbers mean, or refused; experts never stay quantised that way."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from distributed_families import DEVICES, answer, assert_equal, distributed
from quantised_checkpoints import edit_config, edit_weights, write_fp8, write_mxfp4
from safetensors.torch import load_file

from bs_node.model import plain_model
from testbed.checkpoint.manifest import BS_NAME, shard_name
from testbed.checkpoint.split import split
from testbed.errors import CheckpointError
from testbed.policies.topk import TopK

pytestmark = [pytest.mark.torch]
EXPERT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def refuse(model_dir: Path, words: str) -> None:
    out = model_dir.parent / "split"
    with pytest.raises(CheckpointError, match=words) as caught:
        split(model_dir, out, DEVICES)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def assert_means(folder: Path) -> None:
    plain = answer(plain_model(folder / "plain", "float32"))
    model, _ = distributed(folder / "quantised", folder / "split", TopK())
    assert_equal(answer(model), plain)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "minimax_m2", "qwen3_moe"])
def test_an_fp8_checkpoint_answers_bit_for_bit_like_the_numbers_that_it_means(family: str, tmp_path: Path) -> None:
    assert_means(write_fp8(family, tmp_path))


def test_an_mxfp4_checkpoint_answers_bit_for_bit_like_the_numbers_that_it_means(tmp_path: Path) -> None:
    assert_means(write_mxfp4(tmp_path))


def test_a_quantised_checkpoint_is_stored_in_the_dtype_that_its_config_names(tmp_path: Path) -> None:
    write_fp8("qwen3_moe", tmp_path)
    edit_config(tmp_path / "quantised", dtype="bfloat16")
    assert split(tmp_path / "quantised", tmp_path / "split", DEVICES).dtype == "bfloat16"
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    stored = {**load_file(tmp_path / "split" / shard_name("near")), **load_file(tmp_path / "split" / BS_NAME)}
    attention = "model.layers.0.self_attn.q_proj.weight"
    for name, key in (("1.3.down", EXPERT), (attention, attention)):
        assert torch.equal(stored[name], plain[key].bfloat16())


@pytest.mark.parametrize("key", [EXPERT, "model.layers.1.self_attn.q_proj.weight"])
def test_an_fp8_weight_without_its_scale_is_refused(key: str, tmp_path: Path) -> None:
    write_fp8("qwen3_moe", tmp_path)
    edit_weights(tmp_path / "quantised", lambda tensors: tensors.pop(f"{key}_scale_inv"))
    refuse(tmp_path / "quantised", "scale")


def test_an_mxfp4_weight_without_its_scales_is_refused(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    key = "model.layers.1.mlp.experts.down_proj_scales"
    edit_weights(tmp_path / "quantised", lambda tensors: tensors.pop(key))
    refuse(tmp_path / "quantised", "is a tensor missing")


@pytest.mark.parametrize("write", [lambda folder: write_fp8("qwen3_moe", folder), write_mxfp4], ids=["fp8", "mxfp4"])
def test_quantised_weights_that_the_config_does_not_tell_of_are_refused(write: Any, tmp_path: Path) -> None:
    write(tmp_path)
    edit_config(tmp_path / "quantised", quantization_config=None)
    refuse(tmp_path / "quantised", "tensors that this model has no place for")


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "hqq", "quanto"])
def test_what_cannot_be_dequantised_is_refused_by_name(method: str, tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    settings = {"quant_method": method, "bits": 4, "load_in_4bit": True, "quant_type": "int8_weight_only"}
    edit_config(tmp_path / "quantised", quantization_config=settings)
    refuse(tmp_path / "quantised", f"quantised with {method}")
