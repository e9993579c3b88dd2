from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from splits import random_weights

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.stored_formats import (
    FORMATS,
    GROUP,
    ITEM_BYTES,
    check_format,
    decoded,
    expert_bytes,
    filled,
    format_of,
    held_format,
    stored_tensors,
)
from testbed.errors import CheckpointError

MIXTRAL = FfnSpec(width=4096, inner=14336)
LAYERS = 32


@given(inputs=st.integers(1, 20000))
def test_a_row_is_filled_up_to_whole_groups_and_by_less_than_one(inputs: int) -> None:
    assert filled(inputs) % GROUP == 0
    assert 0 <= filled(inputs) - inputs < GROUP


@given(spec=st.builds(FfnSpec, width=st.integers(1, 99), inner=st.integers(1, 99), has_bias=st.booleans()))
@pytest.mark.parametrize("fmt", ["float32", "int8", "int4"])
def test_every_tensor_begins_where_a_float32_may_begin(fmt: str, spec: FfnSpec) -> None:
    for shape, dtype in stored_tensors(spec, fmt).values():
        assert np.prod(shape) * ITEM_BYTES[dtype] % 4 == 0


def test_an_expert_of_mixtral_fits_a_board_of_8_gb_in_int8_and_in_int4() -> None:
    gigabytes = {fmt: LAYERS * expert_bytes(MIXTRAL, fmt) / 1e9 for fmt in FORMATS}
    assert gigabytes["float16"] == pytest.approx(11.27, abs=0.01)
    assert gigabytes["int8"] == pytest.approx(5.64, abs=0.01)
    assert gigabytes["int4"] == pytest.approx(3.52, abs=0.01)


def test_int8_is_the_stored_steps_times_the_scale_of_their_output() -> None:
    spec = FfnSpec(width=2, inner=1, has_gate=False)
    up, down = np.zeros((1, 32), np.int8), np.zeros((2, 32), np.int8)
    up[0, :2], down[:, 0] = [-127, 3], [1, 2]
    stored = {"up": up, "up_scale": np.float32([0.5]), "down": down, "down_scale": np.float32([2, 4])}
    weights = decoded(stored, spec, "int8")
    np.testing.assert_array_equal(weights["up"], [[-63.5, 1.5]])
    np.testing.assert_array_equal(weights["down"], [[2], [8]])


def test_int4_takes_the_high_half_of_a_byte_for_the_even_column() -> None:
    spec = FfnSpec(width=3, inner=1, has_gate=False)
    up = np.zeros((1, 16), np.uint8)
    up[0, :2] = [0x0F, 0x80]  # steps -8, 7, 0
    stored = {"up": up, "up_scale_zero": np.float32([[[0.5, 10]]])}
    stored |= {"down": np.zeros((3, 16), np.uint8), "down_scale_zero": np.zeros((3, 1, 2), np.float32)}
    np.testing.assert_array_equal(decoded(stored, spec, "int4")["up"], [[6, 13.5, 10]])


def test_a_float_format_is_decoded_as_it_is() -> None:
    spec = FfnSpec(width=5, inner=3, has_bias=True)
    weights = random_weights(spec, np.random.default_rng(0))
    for part, array in decoded(weights, spec, "float32").items():
        np.testing.assert_array_equal(array, weights[part])
        assert not np.shares_memory(array, weights[part])


def test_a_manifest_that_names_no_format_stores_its_dtype() -> None:
    assert format_of(SimpleNamespace(dtype="bfloat16"), "near") == "bfloat16"
    assert format_of(SimpleNamespace(dtype="bfloat16", weight_format=None), "near") == "bfloat16"
    assert format_of(SimpleNamespace(dtype="bfloat16", weight_format="int8"), "near") == "int8"
    by_device = SimpleNamespace(dtype="float16", weight_format={"far": "int4"})
    assert [format_of(by_device, device) for device in ("near", "far")] == ["float16", "int4"]


def test_an_unknown_format_is_refused_with_those_there_are() -> None:
    with pytest.raises(CheckpointError, match="'int3': use one of float32, float16, bfloat16, int8, int4"):
        check_format("int3")
    with pytest.raises(CheckpointError, match="'fp8'"):
        expert_bytes(MIXTRAL, "fp8")


def test_a_gpu_holds_what_is_stored_a_cpu_widens_floats_and_numpy_everything() -> None:
    assert [held_format(fmt, "gpu") for fmt in FORMATS] == list(FORMATS)
    assert [held_format(fmt, "cpu") for fmt in FORMATS] == ["float32", "float32", "float32", "int8", "int4"]
    assert {held_format(fmt, "numpy") for fmt in FORMATS} == {"float32"}
