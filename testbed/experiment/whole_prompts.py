"""Of a log that lost rows, the prompts that can be measured: those of which every round and token was recorded.

R rounds, P prompts, each under one policy.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from testbed.runlog.reader import Losses

Keys = NDArray[np.int64]


def only_whole_prompts(rounds: pa.Table, tokens: pa.Table, lost: Losses, devices: int) -> tuple[pa.Table, pa.Table]:
    """The rows of both tables without those of prompts that lost any; `lost` are rows of `rounds`.

    Rounds are numbered without a gap, so one that is missing among others is seen. Of those behind the last one only
    their number is known, and after a power cut not even that: they may have been of the last prompt.
    """
    if not rounds.num_rows:
        return rounds, tokens
    once = rounds.filter(pc.equal(rounds["device"], 0))
    key_R, number_R = _keys(once), once["round"].to_numpy().astype(np.int64)
    gap_R = np.flatnonzero(np.diff(number_R, prepend=-1) > 1)
    broken = {*key_R[gap_R].tolist(), *key_R[gap_R[gap_R > 0] - 1].tolist()}
    gone = int(number_R[-1]) + 1 - len(number_R)
    if lost.missing or (lost.full_disk or 0) > gone * devices:
        broken.add(int(key_R[-1]))
    routed_P, told_P = _counts(key_R, once["tokens"].to_numpy()), _counts(_keys(tokens))
    broken |= {key for key, routed in routed_P.items() if told_P.get(key) != routed}
    kept = pa.array(sorted(set(key_R.tolist()) - broken), pa.int64())
    whole_rounds, whole_tokens = (table.filter(pc.is_in(pa.array(_keys(table)), kept)) for table in (rounds, tokens))
    return whole_rounds, whole_tokens


def in_common(mine: pa.Table, reference: pa.Table) -> pa.Array:
    """Prompts that two policies' rounds both have."""
    return pc.unique(mine["prompt"].filter(pc.is_in(mine["prompt"], reference["prompt"])))


def of_prompts(table: pa.Table, prompts: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(table["prompt"], prompts))


def _keys(table: pa.Table) -> Keys:
    """Policy and prompt in one number."""
    keys: Keys = (table["policy"].to_numpy().astype(np.int64) << 32) + table["prompt"].to_numpy()
    return keys


def _counts(key_R: Keys, count_R: Iterable[int] | None = None) -> dict[int, int]:
    key_P, prompt_R = np.unique(key_R, return_inverse=True)
    weight_R = None if count_R is None else np.asarray(count_R, float)
    return dict(zip(key_P.tolist(), np.bincount(prompt_R, weight_R, len(key_P)).astype(int).tolist(), strict=True))
