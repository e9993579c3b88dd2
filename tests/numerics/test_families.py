"""Every family: experts taken out, computed by nodes, and the model is still the same.

The recipe calls parts of transformers that are not documented; these tests are what pins them.
"""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from families import FAMILIES, tiny_model
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from bs_node.model import experts_of, load_bs_model, plain_model
from jetson_node.experts import make_experts
from testbed.checkpoint.split import split

pytestmark = [pytest.mark.torch]
DEVICES = ("near", "mid", "far")
NEW_TOKENS = 5


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_nodes(module: Any, hidden_TD: Any, expert_TK: Any, weight_TK: Any) -> Any:
    """The layer as nodes compute it: all rows of a device in one block, summed in ascending expert."""
    layer, nodes = module.nodes
    parts = {}
    for experts, node in nodes:
        rows = {e: torch.where(torch.eq(expert_TK.T, e)) for e in experts}
        segments = [(e, len(token)) for e, (_, token) in rows.items() if len(token)]
        x_RD = torch.cat([hidden_TD[rows[e][1]] for e, _ in segments]) if segments else hidden_TD[:0]
        y_RD = torch.from_numpy(node.compute(layer, segments, x_RD.numpy()).copy())
        for (e, _), y in zip(segments, y_RD.split([count for _, count in segments]), strict=True):
            parts[e] = (*rows[e], y)
    out_TD = torch.zeros_like(hidden_TD)
    for _, (k, token, y) in sorted(parts.items()):
        out_TD.index_add_(0, token, y * weight_TK[token, k, None])
    return out_TD


def rotated(module: Any, hidden_TD: Any, expert_TK: Any, weight_TK: Any) -> Any:
    return by_nodes(module, hidden_TD, (expert_TK + 1) % module.num_experts, weight_TK)


ALL_EXPERTS_FUNCTIONS.register("by_nodes", by_nodes)
ALL_EXPERTS_FUNCTIONS.register("rotated", rotated)


def distributed(directory: Any, out: Any) -> Any:
    manifest = split(directory, out, DEVICES)
    model = load_bs_model(out, manifest, "float32", "by_nodes")
    nodes = {device: make_experts(out, manifest, device, backend="torch") for device in DEVICES}
    for path, module in experts_of(model).items():
        layer = manifest.layer_at(path).index
        held = {device: [e for at, e in manifest.held_by(device) if at == layer] for device in DEVICES}
        module.nodes = layer, [(held[device], nodes[device]) for device in DEVICES]
    return model


@torch.inference_mode()
def answer(model: Any) -> tuple[Any, Any]:
    prompt = torch.randint(3, 256, (2, 21), generator=torch.Generator().manual_seed(1))
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        **{"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False},
    )
    return model(prompt).logits, tokens


@pytest.mark.parametrize("stacked", [False, True], ids=["one entry per expert", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computed_by_nodes_equals_the_plain_model_bit_for_bit(
    family: str, stacked: bool, tmp_path: Any
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model", save_original_format=not stacked)
    plain_logits, plain_tokens = answer(plain_model(tmp_path / "model", "float32"))
    model = distributed(tmp_path / "model", tmp_path / "split")
    logits, tokens = answer(model)
    assert torch.equal(tokens, plain_tokens)
    assert (logits - plain_logits).abs().max() <= 1e-5
    assert torch.equal(logits, plain_logits)
    model.set_experts_implementation("rotated")
    assert (answer(model)[0] - plain_logits).abs().max() > 1e-2
