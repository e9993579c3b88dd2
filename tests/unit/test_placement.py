from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.checkpoint.placement import place
from testbed.errors import ConfigError


def test_with_as_many_experts_as_devices_expert_q_lives_on_device_q() -> None:
    assert place([3, 3], ["a", "b", "c"]) == ((("a",), ("b",), ("c",)),) * 2


@given(experts=st.integers(1, 40), devices=st.integers(1, 40))
def test_by_default_every_expert_is_on_one_device_and_loads_differ_by_one_at_most(experts: int, devices: int) -> None:
    names = [f"d{n}" for n in range(min(devices, experts))]
    (row,) = place([experts], names)
    assert list(row) == [(names[q % len(names)],) for q in range(experts)]
    loads = [sum(name in holders for holders in row) for name in names]
    assert max(loads) - min(loads) <= 1


def test_a_mapping_may_replicate_an_expert_and_holds_for_every_layer() -> None:
    placement = place([3, 3], ["a", "b"], {"b": [2, 0], "a": [0, 1]})
    assert placement == ((("a", "b"), ("a",), ("b",)),) * 2


@pytest.mark.parametrize(
    ("devices", "mapping", "words"),
    [
        ([], None, "no device"),
        (["a", "a"], None, "'a' is named twice"),
        (["a", "b"], {"a": [0, 1, 2]}, "'b' would hold no expert"),
        (["a"], {"a": [0, 1, 2], "z": [0]}, "'z' is not one of a"),
        (["a"], {"a": [0, 1, 2, 3]}, "expert 3; experts are 0 to 2"),
        (["a"], {"a": [0, 1, -1]}, "expert -1"),
        (["a"], {"a": [0, 2]}, "expert 1 is on no device"),
        (["a", "b", "c", "d"], None, "'d' would hold no expert"),
    ],
)
def test_a_placement_that_cannot_work_is_refused_in_one_line(
    devices: list[str], mapping: dict[str, list[int]] | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        place([3], devices, mapping)
    assert "\n" not in str(caught.value)
