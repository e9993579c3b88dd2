"""Tiny random models, one per family that the project says it can run.

Router weights, biases and expert weights are drawn wide enough that every one of them changes the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = {
    **{"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 256},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
LATENT_ATTENTION = {
    **{"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
    "num_key_value_heads": 4,
}
LINEAR_ATTENTION = {
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "num_hidden_layers": 4,
}
TOP_2_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
TOP_3_LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 3}
TOP_3 = {"num_experts": 8, "num_experts_per_tok": 3}
TOP_3_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "intermediate_size": 96}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
FOUR_GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 96, **TOP_2_LOCAL},
    "minimax": {
        **{"intermediate_size": 96, "head_dim": 16, "block_size": 16, **TOP_2_LOCAL},
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "minimax_m2": {"intermediate_size": 48, "head_dim": 16, **TOP_3_LOCAL},
    "phimoe": {"intermediate_size": 96, "attention_bias": True, "lm_head_bias": True, **TOP_2_LOCAL},
    "qwen2_moe": {
        **{"intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, **TOP_3},
    },
    "qwen3_moe": {"intermediate_size": 96, "moe_intermediate_size": 48, "head_dim": 16, **TOP_3},
    "qwen3_next": {
        **{"intermediate_size": 96, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
        **{"head_dim": 16, **TOP_3, **LINEAR_ATTENTION},
    },
    "qwen3_5_moe_text": {
        **{"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
        **{"head_dim": 16, **TOP_3, **LINEAR_ATTENTION},
    },
    "olmoe": {"intermediate_size": 48, **TOP_3},
    "flex_olmo": {"intermediate_size": 48, **TOP_3},
    "jamba": {
        **{"intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4},
        **{"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"mamba_d_state": 8, "mamba_dt_rank": 8},
    },
    "hunyuan_v1_moe": {"intermediate_size": 48, "num_experts": 8, "moe_topk": 3, "head_dim": 16},
    "ernie4_5_moe": {
        **{"intermediate_size": 96, "moe_intermediate_size": 48, "moe_num_experts": 8, "moe_k": 3},
        **{"moe_num_shared_experts": 2, "moe_layer_start_index": 1},
    },
    "deepseek_v2": {
        **{"n_shared_experts": 2, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy", "head_dim": 8},
        **{**TOP_3_ROUTED, **FOUR_GROUPS, **LATENT_ATTENTION},
    },
    "deepseek_v3": {
        **{"n_shared_experts": 1, "first_k_dense_replace": 1, **TOP_3_ROUTED, **FOUR_GROUPS, **LATENT_ATTENTION},
    },
    "glm4_moe": {
        **{"n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.0, "head_dim": 16},
        **{**TOP_3_ROUTED, **ONE_GROUP},
    },
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 16, **TOP_3_ROUTED, **ONE_GROUP},
    "nemotron_h": {
        **{"moe_shared_expert_intermediate_size": 80, "routed_scaling_factor": 2.5, "moe_latent_size": 32},
        **{"head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2},
        **{"chunk_size": 16, "layers_block_type": ["mamba", "moe", "attention", "moe"], **TOP_3_ROUTED, **ONE_GROUP},
    },
    "lfm2_moe": {
        **{"intermediate_size": 96, "moe_intermediate_size": 48, "num_dense_layers": 1, **TOP_3},
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "granitemoe": {"intermediate_size": 48, **TOP_3_LOCAL},
    "granitemoeshared": {"intermediate_size": 48, "shared_intermediate_size": 64, **TOP_3_LOCAL},
    "gpt_oss": {
        **{"intermediate_size": 64, "head_dim": 16, "sliding_window": 16, **TOP_3_LOCAL},
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
    "gemma4_text": {
        **{"intermediate_size": 96, "moe_intermediate_size": 48, "enable_moe_block": True, "num_experts": 8},
        **{"top_k_experts": 3, "head_dim": 16, "global_head_dim": 16, "hidden_size_per_layer_input": 0},
        **{"num_kv_shared_layers": 0, "sliding_window": 16},
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}

TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")  # what families call it
SCORELESS = {"phimoe"}  # its two softmaxes are over different experts: no one score per expert gives its weights

GATES = ("gate.weight", "router.weight", "router.proj.weight", "gate.wg.weight")
GATE_BIASES = ("router.bias", "router.scale", "per_expert_scale")


def choosing_all(family: str) -> dict[str, Any]:
    """What to change in the family's config so that the gate chooses every expert."""
    settings = {**COMMON, **FAMILIES[family]}
    changes = {name: 8 for name in TOP_K if name in settings}
    return changes | ({"topk_group": settings["n_group"]} if "n_group" in settings else {})


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A model of the family with random weights, in fp32, using its own eager experts."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                _widen(name, tensor)
    return model.eval()


def _widen(name: str, tensor: torch.Tensor) -> None:
    if name.endswith(GATES):
        tensor.normal_(0, 0.3)
    elif "correction_bias" in name or name.endswith("expert_bias"):
        tensor.normal_(0, 0.1)
    elif ".experts." in name:
        tensor.normal_(0, 0.1 if "bias" in name else 0.12)
    elif name.endswith(GATE_BIASES):
        tensor.add_(torch.randn_like(tensor) * 0.1)
