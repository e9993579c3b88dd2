"""Blocks that are sent to be measured, before any is sent to be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from bs_node.blocks import Block, Outcome
from bs_node.dispatcher import Dispatcher
from testbed.policies.base import BoolArray

FIRST_NUMBER = 2**61  # rounds of a run never get so far


class Prober:
    """Sends random rows to the first expert of `holds_NE` that a device holds in `layer`."""

    def __init__(self, dispatcher: Dispatcher, layer: int, holds_NE: BoolArray, width: int) -> None:
        self._dispatcher, self._layer, self._width = dispatcher, layer, width
        self._expert_N = holds_NE.argmax(axis=1).tolist()
        self._rng = np.random.default_rng(0)
        self._number = FIRST_NUMBER

    def probe(self, devices: Sequence[int], rows: int) -> list[Outcome]:
        """One block of `rows` rows to each of these devices at once."""
        token_R, choice_R = np.arange(rows), np.zeros(rows, np.int64)
        hidden_RD = self._rng.standard_normal((rows, self._width), dtype=np.float32)
        blocks = [Block(device, token_R, choice_R, [(self._expert_N[device], rows)]) for device in devices]
        self._number += 1
        outcomes, _ = self._dispatcher.exchange(self._number, self._layer, hidden_RD, blocks)
        return outcomes

    def sweep(self, devices: Sequence[int], rows_list: Sequence[int], repeats: int) -> Iterator[list[Outcome]]:
        """`repeats` rounds of every size, the sizes taking turns, so that a slow moment hits all alike."""
        for _ in range(repeats):
            for rows in rows_list:
                yield self.probe(devices, rows)
