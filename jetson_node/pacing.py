"""How long a block takes on the device that this node plays: emulation for machines that are faster than it."""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from testbed.errors import ConfigError
from testbed.latency.model import ComputeModel

FACTOR = struct.Struct("<d")
LARGEST = 1e9


class Pacing:
    """The emulated compute time of blocks; `factor_file` holds a factor on it that may change at any time.

    The factor is one little-endian double that whoever emulates writes in place: the stretch of time, and a device
    that is throttled for a while. Without a model nothing is emulated.
    """

    def __init__(self, model: ComputeModel | None, factor_file: Path | None = None) -> None:
        self._model = model
        self._factor: mmap.mmap | None = None
        if factor_file is not None:
            try:
                with factor_file.open("rb") as file:
                    self._factor = mmap.mmap(file.fileno(), FACTOR.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise ConfigError(f"--pace-file {factor_file}: not a file of one number ({error})") from error

    def seconds(self, rows: int, experts: int) -> float:
        """Real seconds that the block must take at least; 0 where nothing is emulated."""
        if self._model is None:
            return 0.0
        factor = 1.0 if self._factor is None else FACTOR.unpack_from(self._factor)[0]
        if math.isnan(factor):
            factor = 1.0
        return float(self._model.seconds(rows, experts)) * min(max(factor, 0.0), LARGEST)

    def told(self) -> dict[str, float | None]:
        """What the base station hears of it, before the factor."""
        if self._model is None:
            return {}
        return {"base_s": self._model.base_s, "expert_s": self._model.expert_s, "row_s": self._model.row_s}


def write_factor(file: Path, factor: float) -> None:
    """Set the factor of the node that reads this file. In place: the node keeps its mapping."""
    with file.open("r+b" if file.exists() else "wb") as target:
        target.write(FACTOR.pack(factor))
