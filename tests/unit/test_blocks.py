from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bs_node.blocks import Block, Combiner, Outcome, PlainRows, arrived, combine, group
from bs_node.dispatcher import InProcessDispatcher, Watcher
from testbed.policies.base import DROPPED
from testbed.runlog.schema import Status

WIDTH = 5
Float32 = NDArray[np.float32]


class Routed(NamedTuple):
    """A round as the gate and a policy leave it, with the output every pair would have."""

    experts: int
    expert_TK: NDArray[np.int64]
    device_TK: NDArray[np.int64]
    weight_TK: Float32
    output_TED: Float32

    @property
    def kept(self) -> list[tuple[int, int, int, int]]:
        """(device, expert, token, choice) of every pair that is sent."""
        pairs = np.ndindex(*self.expert_TK.shape)
        return [
            (int(self.device_TK[pair]), int(self.expert_TK[pair]), *pair) for pair in pairs if self.device_TK[pair] >= 0
        ]


@st.composite
def rounds(draw: st.DrawFn) -> Routed:
    """Several experts per device, several devices per expert, any pairs dropped."""
    tokens, devices, experts = draw(st.integers(0, 12)), draw(st.integers(1, 5)), draw(st.integers(1, 7))
    top_k = draw(st.integers(1, experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    expert_TK = np.array([rng.permutation(experts)[:top_k] for _ in range(tokens)], np.int64).reshape(tokens, top_k)
    first_device_E = rng.integers(0, devices, experts)
    replicas = draw(st.integers(1, devices))
    device_TK = (first_device_E[expert_TK] + rng.integers(0, replicas, expert_TK.shape)) % devices
    device_TK[rng.random(expert_TK.shape) < draw(st.sampled_from([0, 0.3, 1]))] = DROPPED
    weight_TK = rng.random(expert_TK.shape, np.float32)
    scale_TE1 = 10.0 ** rng.uniform(-4, 4, (tokens, experts, 1))
    output_TED = (scale_TE1 * rng.standard_normal((tokens, experts, WIDTH))).astype(np.float32)
    return Routed(experts, expert_TK, device_TK, weight_TK, output_TED)


def blocks_of(routed: Routed) -> list[Block]:
    return group(routed.expert_TK, routed.device_TK, 5, routed.experts)


def expert_R(block: Block) -> list[int]:
    return [expert for expert, rows in block.segments for _ in range(rows)]


def answered(routed: Routed, blocks: Sequence[Block]) -> list[Outcome]:
    return [Outcome(b, Status.ANSWERED, PlainRows(routed.output_TED[b.token_R, expert_R(b)])) for b in blocks]


def combined(routed: Routed, outcomes: Sequence[Outcome]) -> Float32:
    out_TD = np.zeros((len(routed.expert_TK), WIDTH), np.float32)
    combine(outcomes, routed.weight_TK, out_TD)
    return out_TD


def slowly_combined(routed: Routed, lost: frozenset[int] = frozenset()) -> Float32:
    """Eq. 1, one pair after the other in ascending expert, rounded to float32 at every step."""
    out_TD = np.zeros((len(routed.expert_TK), WIDTH), np.float32)
    for device, expert, token, choice in sorted(routed.kept, key=lambda pair: pair[1:]):
        if device not in lost:
            out_TD[token] += routed.output_TED[token, expert] * routed.weight_TK[token, choice]
    return out_TD


@given(rounds())
def test_every_kept_pair_is_in_exactly_one_block_in_ascending_expert_and_token(routed: Routed) -> None:
    blocks = blocks_of(routed)
    grouped = [
        (block.device, *pair)
        for block in blocks
        for pair in zip(expert_R(block), block.token_R.tolist(), block.choice_R.tolist(), strict=True)
    ]
    assert grouped == sorted(routed.kept)
    for block in blocks:
        assert block.rows == sum(rows for _, rows in block.segments) > 0
        experts = [expert for expert, _ in block.segments]
        assert experts == sorted(set(experts))


@given(rounds())
def test_a_block_holds_what_travels_as_plain_numbers(routed: Routed) -> None:
    for block in blocks_of(routed):
        assert type(block.device) is int
        assert {type(value) for segment in block.segments for value in segment} == {int}
        assert block.token_R.dtype == block.choice_R.dtype == np.int64


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_narrow_indices_do_not_overflow(dtype: Any) -> None:
    expert_TK, device_TK = np.array([[299, 0], [7, 299]], dtype), np.array([[255, 0], [255, 1]], dtype)
    blocks = group(expert_TK, device_TK, 256, 300)
    assert [(b.device, b.segments, b.token_R.tolist(), b.choice_R.tolist()) for b in blocks] == [
        (0, [(0, 1)], [0], [1]),
        (1, [(299, 1)], [1], [1]),
        (255, [(7, 1), (299, 1)], [1, 0], [0, 0]),
    ]


def test_a_round_of_which_nothing_is_kept_has_no_blocks_and_adds_nothing() -> None:
    expert_TK = np.zeros((3, 2), np.int64)
    assert group(expert_TK, np.full_like(expert_TK, DROPPED), 5, 4) == []
    assert group(expert_TK[:0], expert_TK[:0], 5, 4) == []
    out_TD = np.ones((3, WIDTH), np.float32)
    combine([], np.ones((3, 2), np.float32), out_TD)
    assert (out_TD == 1).all()


@given(rounds(), st.randoms(use_true_random=False))
def test_combine_is_bitwise_the_slow_sum_whatever_came_first(routed: Routed, random: Any) -> None:
    outcomes = answered(routed, blocks_of(routed))
    expected = slowly_combined(routed).tobytes()
    assert combined(routed, outcomes).tobytes() == expected
    random.shuffle(outcomes)
    assert combined(routed, outcomes).tobytes() == expected


@given(rounds(), st.randoms(use_true_random=False))
def test_adding_up_while_replies_come_is_bitwise_the_slow_sum_in_any_order_of_coming(
    routed: Routed, random: Any
) -> None:
    blocks = blocks_of(routed)
    combiner = Combiner(blocks, routed.weight_TK, lambda: np.zeros((len(routed.expert_TK), WIDTH), np.float32))
    outcomes = answered(routed, blocks)
    random.shuffle(outcomes)
    for outcome in outcomes:
        combiner.take(outcome)
    assert combiner.out_TD.tobytes() == slowly_combined(routed).tobytes()


@pytest.mark.parametrize(("expert", "device"), [(4, 0), (-1, 0), (0, 3), (0, -2)])
def test_a_kept_pair_without_an_expert_or_a_device_is_refused(expert: int, device: int) -> None:
    with pytest.raises(ValueError, match="no device below 3 or no expert below 4"):
        group(np.array([[0, expert]]), np.array([[1, device]]), 3, 4)


@given(rounds(), st.sets(st.integers(0, 4)))
def test_a_lost_block_adds_nothing_and_its_pairs_have_not_arrived(routed: Routed, lost: set[int]) -> None:
    outcomes = answered(routed, blocks_of(routed))
    for outcome in outcomes:
        if outcome.block.device in lost:
            outcome.status, outcome.output = Status.LOST, None
    assert combined(routed, outcomes).tobytes() == slowly_combined(routed, frozenset(lost)).tobytes()
    there_TK = (routed.device_TK != DROPPED) & ~np.isin(routed.device_TK, list(lost))
    assert (arrived(outcomes, routed.device_TK) == there_TK).all()


def test_combine_adds_to_what_is_there() -> None:
    block = Block(0, np.array([1]), np.array([0]), [(0, 1)])
    out_TD = np.ones((2, WIDTH), np.float32)
    output = PlainRows(np.full((1, WIDTH), 4, np.float32))
    combine([Outcome(block, Status.ANSWERED, output)], np.full((2, 1), 0.5, np.float32), out_TD)
    assert out_TD[0].tolist() == [1] * WIDTH
    assert out_TD[1].tolist() == [3] * WIDTH


def test_a_round_trip_is_unknown_until_both_ends_of_it_were_seen() -> None:
    outcome = Outcome(Block(0, np.array([0]), np.array([0]), [(0, 1)]), Status.LATE)
    assert outcome.rtt_ns is None
    outcome.bs_sent_ns = 5
    assert outcome.rtt_ns is None
    outcome.bs_received_ns = 9
    assert outcome.rtt_ns == 4


class ScaledByExpert:
    """Expert e of layer l multiplies by e + 1 and adds l; remembers which device it is."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, int]]] = []

    def compute(self, layer: int, segments: Sequence[tuple[int, int]], x_RD: Float32) -> Float32:
        self.calls.append(list(segments))
        factors = np.array([expert + 1 for expert, _ in segments], np.float32)
        factor_R = np.repeat(factors, [rows for _, rows in segments])
        return x_RD * factor_R[:, None] + layer


@given(rounds())
def test_the_in_process_dispatcher_gives_every_block_to_its_device_and_its_rows_to_their_experts(
    routed: Routed,
) -> None:
    devices = [ScaledByExpert() for _ in range(5)]
    blocks = blocks_of(routed)
    hidden_TD = routed.output_TED[:, 0]
    heard: list[Outcome | None] = []
    watcher = Watcher(sent=lambda: heard.append(None), answered=heard.append)
    outcomes, times = InProcessDispatcher(devices).exchange(9, 2, np.ascontiguousarray(hidden_TD), blocks, watcher)
    assert [outcome.block for outcome in outcomes] == blocks
    assert heard == [None, *outcomes]
    for outcome in outcomes:
        block = outcome.block
        factor_R1 = np.array(expert_R(block), np.float32)[:, None] + 1
        assert outcome.status is Status.ANSWERED
        assert isinstance(outcome.output, PlainRows)
        assert (outcome.output.y_RD == hidden_TD[block.token_R] * factor_R1 + 2).all()
        assert outcome.output.y_RD.dtype == np.float32
        assert devices[block.device].calls == [block.segments]
        assert outcome.rtt_ns is None
    assert times.send_ns == times.wait_ns == 0
