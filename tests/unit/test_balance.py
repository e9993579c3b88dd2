from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from testbed.checkpoint.balance import Balance, Capacity, balance, even_usage
from testbed.checkpoint.placement import as_mapping, place
from testbed.errors import ConfigError

EXPERT_BYTES = 10
SKEWED = np.array([0.9, 0.1, 0.1, 0.1, 0.6, 0.1, 0.05, 0.05])


def nodes_of(count: int, layers: int = 1, slots: float | None = None) -> list[Capacity]:
    memory = None if slots is None else slots * EXPERT_BYTES * layers
    return [Capacity(f"n{n}", (EXPERT_BYTES,) * layers, memory) for n in range(count)]


def block_time(nodes: list[Capacity], usage_LE: list[np.ndarray], placement: object) -> float:
    state = Balance(nodes, usage_LE)
    for layer, row in enumerate(placement):  # type: ignore[var-annotated, arg-type]
        for expert, holders in enumerate(row):
            for name in holders:
                state.give([node.name for node in nodes].index(name), expert, [layer])
    return state.block_time()


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Capacity], list[np.ndarray]]:
    layers, experts, count = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    sizes = st.integers(1, 20)
    nodes = [
        Capacity(
            f"n{n}",
            (draw(sizes),) * layers,
            draw(st.none() | st.integers(0, 400)),
            draw(st.floats(0.1, 10)),
        )
        for n in range(count)
    ]
    usage = st.lists(st.floats(0.01, 1), min_size=experts, max_size=experts)
    return nodes, [np.array(draw(usage)) for _ in range(layers)]


@settings(max_examples=60, deadline=None)
@given(situation=situations(), copies=st.integers(1, 3), by_layer=st.booleans())
def test_every_expert_is_somewhere_and_no_memory_is_exceeded_or_one_line_says_what_is_missing(
    situation: tuple[list[Capacity], list[np.ndarray]], copies: int, by_layer: bool
) -> None:
    nodes, usage_LE = situation
    found = refused = None
    try:
        found = balance(nodes, usage_LE, copies=copies, by_layer=by_layer)
    except ConfigError as error:
        refused = str(error)
    if found is None:
        assert refused is not None
        assert "\n" not in refused
        assert any(f"{node.name} has" in refused for node in nodes)
        assert "are missing" in refused
        return
    placement = found.placement()
    assert all(holders for row in placement for holders in row)
    for node in nodes:
        held = [layer for layer, row in enumerate(placement) for holders in row if node.name in holders]
        assert held
        assert sum(node.expert_bytes_L[layer] for layer in held) <= (node.memory_bytes or np.inf)
    again = balance(nodes, usage_LE, copies=copies, by_layer=by_layer)
    assert again.placement() == placement
    names = [node.name for node in nodes]
    assert place([len(usage_E) for usage_E in usage_LE], names, as_mapping(placement, names)) == placement


@settings(max_examples=60, deadline=None)
@given(situation=situations())
def test_it_is_never_worse_than_expert_q_on_node_q_mod_n(situation: tuple[list[Capacity], list[np.ndarray]]) -> None:
    nodes, usage_LE = situation
    assume(len(usage_LE[0]) >= len(nodes))
    free = [Capacity(node.name, node.expert_bytes_L, None, node.speed) for node in nodes]
    default = place([len(usage_E) for usage_E in usage_LE], [node.name for node in nodes])
    assert balance(free, usage_LE).block_time() <= block_time(free, usage_LE, default) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(experts=st.integers(1, 20), count=st.integers(1, 20), layers=st.integers(1, 3))
def test_expert_q_is_on_node_q_mod_n_where_nothing_is_known(experts: int, count: int, layers: int) -> None:
    assume(experts >= count)
    nodes = nodes_of(count, layers)
    found = balance(nodes, even_usage([experts] * layers, [2] * layers))
    assert found.placement() == place([experts] * layers, [node.name for node in nodes])


def test_skewed_use_is_balanced_better_than_by_turns() -> None:
    nodes = nodes_of(4)
    found = balance(nodes, [SKEWED])
    assert found.block_time() < 0.7 * block_time(nodes, [SKEWED], place([8], [node.name for node in nodes]))
    assert found.block_time() == pytest.approx(0.9)


def test_a_node_twice_as_quick_gets_more() -> None:
    nodes = [Capacity("slow", (1,)), Capacity("quick", (1,), speed=2.0)]
    found = balance(nodes, even_usage([6], [2]))
    assert [len(held) for held in as_mapping(found.placement(), ["slow", "quick"]).values()] == [2, 4]


def test_copies_of_busy_experts_shorten_a_block_within_memory() -> None:
    once, twice = (balance(nodes_of(4, slots=4), [SKEWED], copies=copies) for copies in (1, 2))
    assert twice.block_time() < 0.8 * once.block_time()
    assert (twice.free_N >= 0).all()
    assert len(twice.placement()[0][0]) == 2
    assert all(len(holders) <= 2 for holders in twice.placement()[0])


def test_placing_layer_by_layer_follows_each_layers_own_use() -> None:
    usage_LE = [np.array(usage) for usage in ([0.5, 0.5, 0.1, 0.1], [0.5, 0.1, 0.5, 0.1], [0.5, 0.1, 0.1, 0.5])]
    nodes = nodes_of(2, layers=3)
    assert balance(nodes, usage_LE, by_layer=True).block_time() == pytest.approx(0.6)
    assert balance(nodes, usage_LE).block_time() == pytest.approx(0.7)


def test_more_nodes_than_experts_gives_the_others_copies() -> None:
    placement = balance(nodes_of(5), even_usage([3], [1])).placement()
    assert sorted(len(holders) for holders in placement[0]) == [1, 2, 2]


def test_a_model_too_large_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"expert 4 of all layers, and 3 more fits on no node: n0 .* are missing"):
        balance(nodes_of(2, slots=2), even_usage([8], [2]))


def test_a_node_too_small_for_one_expert_is_refused_by_name() -> None:
    nodes = [*nodes_of(1), Capacity("tiny", (EXPERT_BYTES,), 9)]
    with pytest.raises(ConfigError, match=r"node tiny has 0.00 GB .* are missing; leave it out"):
        balance(nodes, even_usage([8], [2]))
