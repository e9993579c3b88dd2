# ruff: noqa: E402 - what is imported below needs what importorskip has just found
"""The shipped model, and the pieces that trained it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tokenizers import Tokenizer
from transformers import MixtralForCausalLM

from testbed.demo.evaluate import evaluate, expert_load, held_out_tokens
from testbed.demo.muon import orthogonal
from testbed.demo.train import Recipe, build_model, build_optimizers, rate_factor, take_step

pytestmark = pytest.mark.torch
MODEL = Path(__file__).parents[2] / "testbed" / "demo" / "model"


@pytest.fixture(scope="module")
def demo() -> MixtralForCausalLM:
    torch.set_num_threads(1)
    return MixtralForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train(False)


def test_the_checkpoint_is_small_and_generates_with_a_cache() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 20e6
    config = json.loads((MODEL / "config.json").read_text())
    assert config["output_router_logits"] is False
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert config["num_hidden_layers"] >= 4


def test_the_model_is_as_good_as_its_card_says(demo: MixtralForCausalLM) -> None:
    """On fewer windows than the card's, and another Python's library may be running: hence the slack."""
    card = (MODEL / "README.md").read_text()
    claimed = re.search(r"\| ([\d.]+) \| ([\d.]+) % \|", card)
    assert claimed is not None
    held_out = held_out_tokens(Tokenizer.from_file(str(MODEL / "tokenizer.json")))
    found = evaluate(demo, held_out, windows=300)
    assert found["bits_per_byte"] == pytest.approx(float(claimed[1]), rel=0.05)
    assert 100 * found["accuracy"] == pytest.approx(float(claimed[2]), rel=0.05)


def test_every_expert_of_every_layer_is_used(demo: MixtralForCausalLM) -> None:
    held_out = held_out_tokens(Tokenizer.from_file(str(MODEL / "tokenizer.json")))
    load = expert_load(demo, held_out, windows=20)
    assert min(min(shares) for shares in load) > 0.02  # an even share is 0.125


@pytest.mark.parametrize("shape", [(8, 6), (6, 8), (3, 10, 4)])
def test_muon_makes_an_update_whose_singular_values_are_near_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.35


def test_a_few_steps_lower_the_loss() -> None:
    torch.manual_seed(0)
    recipe = Recipe(
        vocabulary=64,
        hidden=64,
        intermediate=32,
        layers=1,
        window_tokens=16,
        batch_windows=8,
        tokens=2560,
        warmup_steps=2,
    )
    model = build_model(recipe)
    optimizers = build_optimizers(model, recipe)
    text = torch.arange(2000) % 7
    losses = [take_step(model, optimizers, text, recipe, step) for step in range(recipe.steps)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_learning_rate_warms_up_stays_and_ends_at_zero() -> None:
    recipe = Recipe(tokens=4096 * 1000, warmup_steps=100, decay_fraction=0.4)
    assert rate_factor(0, recipe) == pytest.approx(0.01)
    assert rate_factor(300, recipe) == 1.0
    assert rate_factor(800, recipe) == pytest.approx(0.5)
    assert rate_factor(1000, recipe) == 0.0
