from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.wire.quantization import accumulate

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch


@given(
    rows=st.integers(1, 40), tokens=st.integers(1, 8), width=st.sampled_from([1, 3, 16, 33, 256]), seed=st.integers(0)
)
def test_accumulate_is_bitwise_index_add_of_the_weighted_rows(rows: int, tokens: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y_RD = (rng.standard_normal((rows, width)) * 10.0 ** rng.uniform(-6, 4, (rows, 1))).astype(np.float32)
    weight_R = rng.random(rows).astype(np.float32)
    token_R = rng.integers(0, tokens, rows)
    out_TD = rng.standard_normal((tokens, width)).astype(np.float32)
    expected_TD = torch.from_numpy(out_TD.copy())
    weighted_RD = torch.from_numpy(y_RD) * torch.from_numpy(weight_R)[:, None]
    expected_TD.index_add_(0, torch.from_numpy(token_R), weighted_RD)
    accumulate(y_RD, weight_R, token_R, out_TD)
    assert out_TD.tobytes() == expected_TD.numpy().tobytes()
