"""Every family: experts taken out, computed by nodes, and the model is still the same.

The recipe calls parts of transformers that are not documented; these tests are what pins them. A new family joins with
one line of `families.FAMILIES`.
"""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from distributed_families import NextExpert, answer, assert_equal, distributed
from families import FAMILIES, tiny_model

from bs_node.model import plain_model
from testbed.policies.topk import TopK

pytestmark = [pytest.mark.torch]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("stacked", [False, True], ids=["one entry per expert", "stacked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computed_by_nodes_equals_the_plain_model_bit_for_bit(
    family: str, stacked: bool, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model", save_original_format=not stacked)
    plain = answer(plain_model(tmp_path / "model", "float32"))
    model, session = distributed(tmp_path / "model", tmp_path / "split", TopK())
    assert_equal(answer(model), plain)
    session.policy = NextExpert()
    assert (answer(model)[0] - plain[0]).abs().max() > 1e-2
