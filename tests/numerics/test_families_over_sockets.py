"""Families over the air: their experts in processes of their own, behind CURVE sockets, equal the plain model."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from distributed_families import NextExpert, answer, assert_equal
from families import FAMILIES, tiny_model
from rack import rack

from bs_node.model import plain_model
from testbed.checkpoint.split import split

pytestmark = [pytest.mark.torch]
TWO = ("jetson-0", "jetson-1")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_node_processes_answer_bit_for_bit_like_the_plain_model(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    split(tmp_path / "model", tmp_path / "split", TWO)
    plain = answer(plain_model(tmp_path / "model", "float32"))
    with rack(tmp_path / "split", tmp_path, arguments=["--backend", "torch"]) as nodes:
        session = nodes.session(nodes.wireless())
        model = nodes.model(session)
        assert_equal(answer(model), plain)
        session.policy = NextExpert()
        assert (answer(model)[0] - plain[0]).abs().max() > 1e-2
