"""What the gate chose, block by block: the routing that every draw of a simulation meets again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from testbed.checkpoint.manifest import Manifest
from testbed.errors import ConfigError
from testbed.policies.base import BoolArray, FloatArray, Routing
from testbed.policies.selection import routed
from testbed.runlog.reader import read_table
from testbed.runlog.schema import GenerationPhase

NO_EXPERT = -1


class RoutedBlock(NamedTuple):
    """One MoE block of one prompt's prefill."""

    prompt: int
    routing: Routing


def recorded_blocks(run_dir: Path, manifest: Manifest) -> list[RoutedBlock]:
    """The prefill blocks of a recorded run under its first policy, its experts placed as in `manifest`.

    Raises RunLogError for what is no run, ConfigError where its model has other layers or experts.
    """
    tokens = read_table(run_dir, "tokens")
    chosen = pc.and_(pc.equal(tokens["policy"], 0), pc.equal(tokens["phase"], int(GenerationPhase.PREFILL)))
    tokens = tokens.filter(chosen)
    if not tokens.num_rows:
        raise ConfigError(f"{run_dir}: no prompt was scored in this run; name one with score_prompts above 0")
    round_T = tokens["round"].to_numpy()
    starts = [0, *(np.flatnonzero(np.diff(round_T)) + 1), len(round_T)]
    return [_recorded_block(run_dir, tokens.slice(int(a), int(b - a)), manifest) for a, b in pairwise(starts)]


def _recorded_block(run_dir: Path, tokens: pa.Table, manifest: Manifest) -> RoutedBlock:
    layer, expert_TK = tokens["layer"][0].as_py(), _matrix(tokens, "expert").astype(np.int64)
    scored = "score" in tokens.column_names and tokens["score"][0].as_py()[0] is not None
    score_TE = _matrix(tokens, "score").astype(np.float32) if scored else None
    if layer >= len(manifest.layers) or expert_TK.shape[1] != manifest.layers[layer].top_k:
        raise ConfigError(f"{run_dir}: recorded with another model than the run file's: name a run of the same one")
    if score_TE is not None:
        score_TE = score_TE[:, : manifest.layers[layer].experts]
    weight_TK = _matrix(tokens, "weight").astype(np.float32)
    routing = Routing(layer, expert_TK, weight_TK, manifest.holds_NE(layer), score_TE)
    return RoutedBlock(int(tokens["prompt"][0].as_py()), routing)


def _matrix(tokens: pa.Table, name: str) -> NDArray[np.generic]:
    values: NDArray[np.generic] = pc.list_flatten(tokens[name]).to_numpy()
    return values.reshape(tokens.num_rows, -1)


@dataclass(frozen=True, slots=True)
class PackedBlocks:
    """B blocks as arrays, for loops that are compiled. Tokens of all blocks follow one another."""

    first_B: NDArray[np.int64]  # first token of every block, and the end: B + 1 values
    expert_TK: NDArray[np.int64]  # NO_EXPERT where the gate chose none
    weight_TK: NDArray[np.float64]  # 0 there
    holds_BNE: BoolArray
    prompt_B: NDArray[np.int64]

    @property
    def pairs(self) -> int:
        """Pairs (token, expert) that the gate chose."""
        return int((self.expert_TK != NO_EXPERT).sum())

    @property
    def mass(self) -> float:
        """The gate's weight in all."""
        return float(self.weight_TK.sum())

    @property
    def tokens(self) -> int:
        return len(self.expert_TK)


def pack(blocks: Sequence[RoutedBlock]) -> PackedBlocks:
    """The blocks as arrays, filled up to the most choices and experts of a layer. Raises ConfigError if none."""
    if not blocks:
        raise ConfigError("nothing to simulate: raise [workload] score_prompts, whose prefill is what is simulated")
    routings = [block.routing for block in blocks]
    choices = max(routing.expert_TK.shape[1] for routing in routings)
    experts = max(routing.holds_NE.shape[1] for routing in routings)
    expert_TK = np.concatenate([_widen(_named_experts(r), choices, NO_EXPERT) for r in routings])
    weight_TK = np.concatenate([_widen(_named_weights(r), choices, 0.0) for r in routings])
    return PackedBlocks(
        np.cumsum([0, *(len(routing.expert_TK) for routing in routings)]),
        np.ascontiguousarray(expert_TK, np.int64),
        np.ascontiguousarray(weight_TK, np.float64),
        np.stack([_widen(routing.holds_NE, experts, False) for routing in routings]),
        np.array([block.prompt for block in blocks]),
    )


def _named_experts(routing: Routing) -> NDArray[np.generic]:
    return np.where(routed(routing), routing.expert_TK, NO_EXPERT)


def _named_weights(routing: Routing) -> FloatArray:
    return np.where(routed(routing), routing.weight_TK.astype(np.float64), 0.0)


def _widen(values: NDArray[np.generic], width: int, fill: float) -> NDArray[np.generic]:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=fill)
