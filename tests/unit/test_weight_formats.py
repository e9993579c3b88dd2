from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splits import random_weights

from jetson_node.experts import ffn_numpy
from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.stored_formats import FORMATS, GROUP, decoded, expert_bytes, stored_tensors
from testbed.errors import CheckpointError

pytestmark = [pytest.mark.torch]
torch = pytest.importorskip("torch")

from testbed.checkpoint.ffn_torch import ffn_torch  # noqa: E402 - torch may be missing
from testbed.checkpoint.packed_weights import compute_dtype, hold_expert  # noqa: E402
from testbed.checkpoint.weight_formats import encode_expert, encoded_shapes  # noqa: E402

SPECS = {
    "gated": FfnSpec(width=96, inner=160),
    "one of gpt-oss": FfnSpec(width=96, inner=64, has_bias=True, act="silu", limit=7.0, alpha=1.702),
    "without gate": FfnSpec(width=128, inner=192, has_gate=False, act="relu2"),
    "without gate, with bias": FfnSpec(width=64, inner=96, has_gate=False, has_bias=True, act="relu"),
    "clamped": FfnSpec(width=64, inner=256, limit=0.5, act="gelu"),
    "sizes that fill no group": FfnSpec(width=37, inner=75, has_bias=True, act="gelu_pytorch_tanh"),
}
# Root mean square of the error over that of the output. A number of bfloat16 is off by up to 2**-9 = 0.2 %, and rows,
# inner values and both results are rounded to it: 2 % is several times their sum also where a squared activation
# doubles it. Against the weights before encoding: a step of int8 is about 1/32, of int4 about 1/3 of a normal weight's
# deviation, an error of 0.9 % and of 10 % in each of three matrices; doubled for what activations make of it.
ROUNDING = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 0.02, "int8": 0.02, "int4": 0.02}
ENCODING = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 0.03, "int8": 0.05, "int4": 0.4}


def as_numpy(stored: Any) -> dict[str, Any]:
    return {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in stored.items()}


def as_torch(weights: Any) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in weights.items()}


def relative(given_RD: Any, wanted_RD: Any) -> float:
    return float(np.linalg.norm(given_RD - wanted_RD) / np.linalg.norm(wanted_RD))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_ffn_computes_in_every_format_what_the_reference_computes(spec: FfnSpec, fmt: str) -> None:
    rng = np.random.default_rng(3)
    weights, x_RD = random_weights(spec, rng), rng.standard_normal((33, spec.width)).astype(np.float32)
    stored = encode_expert(as_torch(weights), fmt, spec)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == encoded_shapes(spec, fmt)
    dtype = compute_dtype(fmt, fmt if fmt.startswith(("float", "b")) else "float32")
    y_RD = ffn_torch(torch.from_numpy(x_RD).to(dtype), hold_expert(stored, spec, fmt, dtype), spec).float().numpy()
    decoded_RD = ffn_numpy(x_RD, decoded(as_numpy(stored), spec, fmt), spec)
    assert relative(y_RD, decoded_RD) < ROUNDING[fmt]
    assert relative(decoded_RD, ffn_numpy(x_RD, weights, spec)) < ENCODING[fmt]


@settings(deadline=None)
@given(inputs=st.integers(1, 200), outputs=st.integers(1, 90), rows=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_a_packed_product_is_that_of_the_decoded_matrix_but_for_rounding(
    fmt: str, inputs: int, outputs: int, rows: int, seed: int
) -> None:
    spec = FfnSpec(width=inputs, inner=outputs, has_gate=False)
    rng = np.random.default_rng(seed)
    stored = encode_expert(as_torch(random_weights(spec, rng)), fmt, spec)
    x_RI = torch.from_numpy(rng.standard_normal((rows, inputs)).astype(np.float32)).bfloat16()
    y_RO = hold_expert(stored, spec, fmt, torch.bfloat16)["up"].times(x_RI).double().numpy()
    matrix_OI, x = decoded(as_numpy(stored), spec, fmt)["up"].astype(np.float64), x_RI.double().numpy()
    exact_RO = x @ matrix_OI.T
    terms_OI = np.abs(matrix_OI)
    if fmt == "int4":  # the kernel may round (q - 8) * scale and the sum with zero to bfloat16
        zero_OI = np.abs(as_numpy(stored)["up_scale_zero"][..., 1].repeat(GROUP, 1)[:, :inputs])
        terms_OI = terms_OI + 2 * zero_OI
    slack = 2**-7 if fmt == "int4" else inputs * 2**-23  # sums are kept in float32
    bound_RO = 2**-8 * np.abs(exact_RO) + slack * (np.abs(x) @ terms_OI.T) + 1e-12
    assert (np.abs(y_RO - exact_RO) <= bound_RO).all()


@settings(deadline=None)
@given(
    inputs=st.integers(1, 300), outputs=st.integers(1, 80), seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e20]), shift=st.sampled_from([0.0, 0.5, 10.0]),
)  # fmt: skip
@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_no_weight_is_further_from_its_encoding_than_half_a_step(
    fmt: str, inputs: int, outputs: int, seed: int, scale: float, shift: float
) -> None:
    spec = FfnSpec(width=inputs, inner=outputs, has_gate=False)
    weights = random_weights(spec, np.random.default_rng(seed))
    weights = {name: ((array + shift) * scale).astype(np.float32) for name, array in weights.items()}
    stored = as_numpy(encode_expert(as_torch(weights), fmt, spec))
    error_OI = np.abs(decoded(stored, spec, fmt)["up"] - weights["up"])
    if fmt == "int8":
        bound_OI = 0.51 * stored["up_scale"][:, None]
    else:  # the zero is rounded to bfloat16, and so may the ends of the range be cut
        step_OG, zero_OG = np.moveaxis(stored["up_scale_zero"], -1, 0)
        bound_OI = (0.51 * step_OG + 2**-8 * np.abs(zero_OG)).repeat(GROUP, 1)[:, :inputs]
    assert (error_OI <= bound_OI).all()


@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, 1.5e-3, -48.0])
def test_weights_that_are_all_equal_stay_equal(value: float, fmt: str) -> None:
    spec = FfnSpec(width=32, inner=16)
    equal = {part: torch.full(shape, value) for part, shape in spec.shapes().items()}
    for array in decoded(as_numpy(encode_expert(equal, fmt, spec)), spec, fmt).values():
        np.testing.assert_allclose(array, value, rtol=2**-7)


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_rows_that_are_packed_in_pieces_are_those_of_the_whole(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = FfnSpec(width=64, inner=300, has_gate=False)
    tensors = as_torch(random_weights(spec, np.random.default_rng(0)))
    x_RI = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    def product() -> Any:
        stored = encode_expert(tensors, fmt, spec)
        return stored, hold_expert(stored, spec, fmt, torch.bfloat16)["up"].times(x_RI)

    whole, y_RO = product()
    monkeypatch.setattr("testbed.checkpoint.weight_formats.ROWS_AT_ONCE", 7)
    monkeypatch.setattr("testbed.checkpoint.packed_weights.ROWS_PACKED_TOGETHER", 64)
    pieces, y_of_pieces_RO = product()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert torch.equal(y_RO, y_of_pieces_RO)


@pytest.mark.parametrize("fmt", FORMATS)
def test_encoding_leaves_the_weights_as_they_were(fmt: str) -> None:
    spec = FfnSpec(width=32, inner=16, has_bias=True)
    tensors = as_torch(random_weights(spec, np.random.default_rng(0)))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    encode_expert(tensors, fmt, spec)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


@pytest.mark.parametrize(("fmt", "value"), [("int8", np.nan), ("int4", -np.inf), ("float16", 1e5), ("float16", np.nan)])
def test_a_weight_that_the_format_cannot_hold_is_refused_by_name(fmt: str, value: float) -> None:
    spec = FfnSpec(width=32, inner=16)
    tensors = as_torch(random_weights(spec, np.random.default_rng(0)))
    tensors["down"][3, 5] = value
    with pytest.raises(CheckpointError, match=r"^down: "):
        encode_expert(tensors, fmt, spec)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_bytes_said_are_those_of_the_tensors(fmt: str) -> None:
    spec = FfnSpec(width=96, inner=75, has_bias=True)
    stored = encode_expert(as_torch(random_weights(spec, np.random.default_rng(0))), fmt, spec)
    assert list(stored) == list(stored_tensors(spec, fmt))
    assert sum(tensor.nbytes for tensor in stored.values()) == expert_bytes(spec, fmt)
