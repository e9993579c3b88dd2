"""The codec of rows on a GPU against the host's, on the CPU everywhere and on a GPU where there is one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from testbed.errors import MessageError
from testbed.wire.kernels import SMALLEST_MAX
from testbed.wire.quantization import SCHEMES, Scheme, quantise

pytestmark = [pytest.mark.torch]
torch = pytest.importorskip("torch")

from testbed.wire.quantization_torch import encode  # noqa: E402 - torch may be missing

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")],
)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
on_every_device = pytest.mark.parametrize("device", ["cpu", GPU])

any_bits = hnp.arrays(
    np.uint32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=st.integers(0, 2**32 - 1)
).map(lambda bits: bits.view(np.float32))


def encoded(hidden_TD: Any, scheme: Scheme, device: str, padded_width: int = 0) -> tuple[Any, Any]:
    rows_TB, refused_T = encode(torch.from_numpy(hidden_TD).to(device), scheme, padded_width)
    return rows_TB.cpu().numpy(), refused_T.cpu().numpy()


def refused_by_the_host(row_1D: Any, scheme: Scheme) -> bool:
    try:
        quantise(row_1D, scheme)
    except MessageError:
        return True
    return False


@every_scheme
@on_every_device
@given(hidden_TD=any_bits)
@example(hidden_TD=np.float32([[65504, 1], [65505, 1], [65519.996, 1], [65520, 1], [-65504, np.nan]]))
@example(hidden_TD=np.float32([[2.0**127, 1], [np.nextafter(np.float32(2.0**127), np.float32(np.inf)), 1]]))
@example(hidden_TD=np.float32([[2.0**128 - 2.0**120], [2.0**128 - 2.0**104], [np.inf], [-np.inf], [0], [-0.0]]))
@example(hidden_TD=np.float32([[SMALLEST_MAX, -1e-40], [np.nextafter(SMALLEST_MAX, np.float32(0)), 1e-45]]))
def test_any_row_is_the_same_bytes_as_on_the_host_or_refused_as_there(
    scheme: Scheme, device: str, hidden_TD: Any
) -> None:
    rows_TB, refused_T = encoded(hidden_TD, scheme, device)
    assert refused_T.tolist() == [refused_by_the_host(row_D[None], scheme) for row_D in hidden_TD]
    np.testing.assert_array_equal(rows_TB[~refused_T], quantise(hidden_TD[~refused_T], scheme))


@every_scheme
@on_every_device
@pytest.mark.parametrize("padded_width", [0, 3, 130, 256])
def test_rows_of_every_magnitude_are_the_same_bytes_at_every_width(
    scheme: Scheme, device: str, padded_width: int
) -> None:
    rng = np.random.default_rng(0)
    hidden_TD = rng.standard_normal((3000, 130)) * 10.0 ** rng.uniform(-40, 4, (3000, 1))
    hidden_TD[::3] = rng.integers(-254, 255, (1000, 130)) / 2  # halfway between two steps of int8
    hidden_TD[::3, 0] = 127
    hidden_TD = np.clip(hidden_TD, -65504, 65504).astype(np.float32)
    rows_TB, refused_T = encoded(hidden_TD, scheme, device, padded_width)
    assert not refused_T.any()
    np.testing.assert_array_equal(rows_TB, quantise(hidden_TD, scheme, None, padded_width))


@every_scheme
@on_every_device
def test_what_fills_up_a_row_is_zero(scheme: Scheme, device: str) -> None:
    ones_TD = np.ones((2, 5), np.float32)
    rows_TB, _ = encoded(ones_TD, scheme, device, padded_width=9)
    assert rows_TB.shape == (2, scheme.row_bytes(9))
    assert not rows_TB[:, scheme.row_bytes(5) :].any()


@every_scheme
@on_every_device
def test_no_rows_are_no_rows(scheme: Scheme, device: str) -> None:
    rows_TB, refused_T = encoded(np.empty((0, 7), np.float32), scheme, device)
    assert rows_TB.shape == (0, scheme.row_bytes(7))
    assert refused_T.shape == (0,)
