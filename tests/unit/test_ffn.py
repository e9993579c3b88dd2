from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import random_weights

from jetson_node.experts import ffn_numpy
from testbed.checkpoint.ffn import FfnSpec

ACTS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_pytorch_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "relu2": lambda x: max(x, 0.0) ** 2,
}


@st.composite
def specs(draw: st.DrawFn) -> FfnSpec:
    return FfnSpec(
        width=draw(st.integers(1, 9)),
        inner=draw(st.integers(1, 9)),
        has_gate=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        act=draw(st.sampled_from(list(ACTS))),
        limit=draw(st.sampled_from([None, 0.5, 7.0])),
        alpha=draw(st.sampled_from([None, 1.702])),
    )


def by_hand(x_D: list[float], weights: Any, spec: FfnSpec) -> list[float]:
    """One row, one number at a time, in double precision."""

    def linear(name: str, v: list[float]) -> list[float]:
        bias = weights[f"{name}_bias"] if spec.has_bias else np.zeros(len(weights[name]))
        return [
            sum(float(w) * a for w, a in zip(row, v, strict=True)) + float(b)
            for row, b in zip(weights[name], bias, strict=True)
        ]

    if not spec.has_gate:
        return linear("down", [ACTS[spec.act](a) for a in linear("up", x_D)])
    both = linear("gate_up", x_D)
    inner = []
    for gate, up in zip(both[: spec.inner], both[spec.inner :], strict=True):
        g, u = (gate, up) if spec.limit is None else (min(gate, spec.limit), max(-spec.limit, min(up, spec.limit)))
        inner.append((u + 1) * g / (1 + math.exp(-spec.alpha * g)) if spec.alpha else ACTS[spec.act](g) * u)
    return linear("down", inner)


def example(spec: FfnSpec, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((5, spec.width)).astype(np.float32) * 3, random_weights(spec, rng, scale=0.5)


@given(spec=specs(), seed=st.integers(0, 2**32 - 1))
def test_the_numpy_ffn_is_the_formula_written_out_by_hand(spec: FfnSpec, seed: int) -> None:
    x_RD, weights = example(spec, seed)
    expected_RD = [by_hand([float(a) for a in row], weights, spec) for row in x_RD]
    np.testing.assert_allclose(ffn_numpy(x_RD, weights, spec), expected_RD, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.filterwarnings("error")
def test_activations_of_huge_values_neither_overflow_nor_vanish(act: str) -> None:
    spec = FfnSpec(width=2, inner=2, has_gate=False, act=act)  # type: ignore[arg-type] # one of them, from ACTS
    identity = {"up": np.eye(2, dtype=np.float32), "down": np.eye(2, dtype=np.float32)}
    out = ffn_numpy(np.array([[1e4, -1e4]], np.float32), identity, spec)
    assert out[0, 0] == pytest.approx(ACTS[act](1e4))
    assert out[0, 1] == 0


def test_the_spec_says_what_a_shard_stores() -> None:
    spec = FfnSpec(width=4096, inner=14336)
    assert spec.shapes() == {"gate_up": (28672, 4096), "down": (4096, 14336)}
    bare = FfnSpec(width=4, inner=6, has_gate=False, has_bias=True)
    assert bare.shapes() == {"up": (6, 4), "down": (4, 6), "up_bias": (6,), "down_bias": (4,)}


@pytest.mark.torch
@settings(deadline=None)
@given(spec=specs(), seed=st.integers(0, 2**32 - 1))
def test_the_torch_ffn_agrees_with_the_numpy_one(spec: FfnSpec, seed: int) -> None:
    torch = pytest.importorskip("torch")
    from testbed.checkpoint.ffn_torch import ffn_torch

    x_RD, weights = example(spec, seed)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    ours = ffn_torch(torch.from_numpy(x_RD), tensors, spec).numpy()
    np.testing.assert_allclose(ours, ffn_numpy(x_RD, weights, spec), rtol=1e-4, atol=1e-4)
