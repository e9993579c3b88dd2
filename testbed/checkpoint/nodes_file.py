"""The nodes file: which boards there are, and what each can take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from testbed.checkpoint.placement import Held
from testbed.checkpoint.stored_formats import ComputesOn, WeightFormat, held_format
from testbed.config.base import DeviceName, ExpertIds, Positive, Section
from testbed.config.loading import read_toml
from testbed.errors import ConfigError

ByLayer = Annotated[tuple[ExpertIds, ...], Field(strict=False)]


class NodeSection(Section):
    name: DeviceName
    memory_gb: Positive | None = None  # that its experts may take, in 10^9 bytes; None: no limit is known
    speed: Positive = 1.0  # rows per second, in any unit that all nodes share
    weight_format: WeightFormat | None = None  # None: as the checkpoint has them
    computes_on: ComputesOn = "gpu"  # by which it holds more than is stored, or does not: `held_format`

    @property
    def memory_bytes(self) -> float | None:
        return None if self.memory_gb is None else self.memory_gb * 1e9


class BaseStationSection(Section):
    memory_gb: Positive | None = None


class NodesFile(Section):
    nodes: Annotated[tuple[NodeSection, ...], Field(strict=False, alias="node", min_length=1)]
    base_station: BaseStationSection = BaseStationSection()
    placement: dict[DeviceName, ExpertIds | ByLayer] | None = None

    @field_validator("nodes")
    @classmethod
    def _each_has_its_own_name(cls, nodes: tuple[NodeSection, ...]) -> tuple[NodeSection, ...]:
        name, count = Counter(node.name for node in nodes).most_common(1)[0]
        if count > 1:
            raise ValueError(f'{count} of them are named "{name}"; give each its own name')
        return nodes

    @property
    def names(self) -> list[str]:
        return [node.name for node in self.nodes]

    def held_formats(self, default: WeightFormat) -> dict[str, str]:
        """How each node will hold its experts in memory."""
        return {node.name: held_format(node.weight_format or default, node.computes_on) for node in self.nodes}

    def weight_formats(self, default: WeightFormat) -> dict[str, WeightFormat]:
        """Of the nodes whose experts are stored as something else than the others'."""
        formats = {node.name: node.weight_format for node in self.nodes}
        return {name: found for name, found in formats.items() if found is not None and found != default}


def load_nodes_file(path: Path) -> NodesFile:
    """Raises ConfigError, one line, for a file that is none."""
    return _validated(path, read_toml(path))


def load_placement(path: Path, nodes: NodesFile) -> Mapping[str, Held]:
    """The [placement] of a file: one that `testbed place` wrote, or a run file. Raises ConfigError."""
    content = read_toml(path)
    if "placement" not in content:
        raise ConfigError(
            f"{path}: no [placement] in it; write one with `testbed place MODEL --nodes FILE --out {path}`"
        )
    document = {"node": [{"name": name} for name in nodes.names], "placement": content["placement"]}
    return _validated(path, document).placement or {}


def _validated(path: Path, content: dict[str, Any]) -> NodesFile:
    try:
        return NodesFile.model_validate(content)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"])
        known = (
            "name, memory_gb, speed, weight_format, computes_on"
            if where.startswith("node.")
            else "[[node]], [base_station]"
        )
        hint = f"; known here are {known}" if first["type"] == "extra_forbidden" else ""
        hint = "; add a [[node]] table with its name and memory_gb" if where == "node" else hint
        raise ConfigError(f"{path}: {where}: {first['msg'].removeprefix('Value error, ')}{hint}") from error
