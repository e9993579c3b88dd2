"""Families that nodes cannot compute are refused in one line, before anything is written."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import COMMON

from testbed.checkpoint.split import split
from testbed.errors import CheckpointError

pytestmark = [pytest.mark.torch]
DBRX = {
    **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 256},
    "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
}
WITHOUT_INTERFACE: dict[str, dict[str, Any]] = {
    **{"dbrx": DBRX, "jetmoe": COMMON, "doge": COMMON, "longcat_flash": COMMON},
    "llama4_text": {**COMMON, "num_local_experts": 4, "head_dim": 16},
}


def refuse(folder: Path, words: str, **config: Any) -> None:
    model_dir = folder / "model"
    model_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words) as caught:
        split(model_dir, folder / "split", ("near", "far"))
    assert "\n" not in str(caught.value)
    assert not (folder / "split").exists()


@pytest.mark.parametrize("family", WITHOUT_INTERFACE)
def test_a_family_whose_experts_do_not_use_the_interface_is_refused_by_name(family: str, tmp_path: Path) -> None:
    words = f"{family} has no experts behind transformers' experts interface"
    refuse(tmp_path, words, model_type=family, **WITHOUT_INTERFACE[family])


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "switch_transformers"])
def test_what_is_no_language_model_by_itself_is_refused_by_name(family: str, tmp_path: Path) -> None:
    refuse(tmp_path, f"{family} is not a causal language model", model_type=family)


@pytest.mark.parametrize("family", ["hy_v4", "inkling2_text"])
def test_experts_whose_activation_is_no_function_of_one_value_are_refused(family: str, tmp_path: Path) -> None:
    small = {"moe_intermediate_size": 48, "intermediate_size": 96, "head_dim": 16, "num_experts": 8}
    words = "Experts: its activation is not a function of one value"
    refuse(tmp_path, words, model_type=family, **COMMON, **small, num_experts_per_tok=2)


def test_a_config_that_no_model_can_be_built_from_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, "config.json: no dbrx can be built from it", model_type="dbrx", **{**DBRX, "attn_config": {}})
    refuse(tmp_path, "config.json", model_type="mixtral", **{**COMMON, "num_attention_heads": 0})


def test_a_model_with_code_of_its_own_is_refused_and_its_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    ran = tmp_path / "ran"
    (tmp_path / "model" / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    refuse(tmp_path, "needs code of its own", model_type="own_moe", auto_map=own)
    assert not ran.exists()
