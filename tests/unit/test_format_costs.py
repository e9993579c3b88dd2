from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from splits import random_weights

from testbed.checkpoint.ffn import FfnSpec
from testbed.checkpoint.stored_formats import FORMATS

pytestmark = [pytest.mark.torch]
torch = pytest.importorskip("torch")

from testbed.checkpoint import format_costs  # noqa: E402 - torch may be missing
from testbed.checkpoint.format_costs import FormatCost, FormatSpeed, format_cost, format_error, format_speed  # noqa: E402

SPEC = FfnSpec(width=64, inner=128)


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    weights = random_weights(SPEC, np.random.default_rng(0))
    return {name: torch.from_numpy(array) for name, array in weights.items()}


def test_fewer_bits_are_a_larger_error(tensors: Any) -> None:
    x_RD = torch.randn(16, SPEC.width, generator=torch.Generator().manual_seed(0))
    error = {fmt: format_error(SPEC, tensors, fmt, x_RD) for fmt in FORMATS}
    assert error["float32"] == 0
    assert 0 < error["float16"] < error["bfloat16"] < error["int8"] < error["int4"] < 0.5


def test_the_error_is_that_of_the_outputs(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_costs, "_computed", lambda x_RD, *_: 1.1 * exact(x_RD, tensors))
    x_RD = torch.randn(5, SPEC.width, generator=torch.Generator().manual_seed(0))
    assert format_error(SPEC, tensors, "int8", x_RD) == pytest.approx(0.1, rel=1e-4)


def exact(x_RD: Any, tensors: Any) -> Any:
    gate, up = (x_RD @ tensors["gate_up"].T).chunk(2, 1)
    return (torch.nn.functional.silu(gate) * up) @ tensors["down"].T


def test_every_number_of_rows_is_timed_beside_the_baseline(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_costs, "COLD_BYTES", 1 << 20)
    speed = format_speed(SPEC, tensors, "int8", (1, 4), seconds=0)
    assert speed.rows == (1, 4)
    assert all(ms > 0 for ms in (*speed.milliseconds, *speed.baseline_milliseconds))


def test_a_format_that_is_slower_here_says_so() -> None:
    speed = FormatSpeed((1, 16, 128), (1.0, 5.0, 9.0), (2.0, 4.0, 9.0))
    assert speed.slower_at() == [16]
    line = FormatCost("int8", 100, 200, 0.01, 1, speed).line()
    assert line.endswith("slower than float16 on this device at 16 rows")
    assert "slower" not in FormatCost("float16", 200, 200, 0.01, 1, speed).line()
    assert "slower" not in FormatCost("int8", 100, 200, 0.01, 1, FormatSpeed((1,), (1.0,), (2.0,))).line()


def test_what_a_format_costs_can_be_read_by_machines(tensors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(format_costs, "COLD_BYTES", 1 << 20)
    cost = json.loads(json.dumps(format_cost(SPEC, tensors, "int4", (1,)).as_dict()))
    assert cost["weight_format"] == "int4"
    assert cost["expert_bytes"] < 0.32 * cost["baseline_bytes"]
    assert cost["speed"]["rows"] == [1]
    assert 0 < cost["relative_error"] < 0.5
