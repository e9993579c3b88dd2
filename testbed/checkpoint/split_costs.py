"""What the weight formats of a split cost in error and speed, measured on the machine that splits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from testbed.checkpoint.format_costs import BASELINE, ROWS, FormatCost, format_cost
from testbed.checkpoint.job import SplitJob
from testbed.checkpoint.split import canonical_expert
from testbed.checkpoint.stored_formats import FLOAT_NAMES
from testbed.checkpoint.weight_formats import Tensors
from testbed.cli.output import table

RANDOM_SCALE = 0.02  # of random weights: a usual deviation at a model's start


class SplitCosts(NamedTuple):
    """The cost of each packed format among the nodes', none where there is none."""

    costs: tuple[FormatCost, ...]
    expert: str  # whose weights they were measured with

    def document(self) -> dict[str, Any]:
        measured_with = self.expert if self.costs else None
        return {
            "weight_formats": [cost.as_dict() for cost in self.costs],
            "weight_formats_measured_with": measured_with,
        }

    def table(self) -> Table:
        heads = ["format", "MB an expert", "relative\nerror", *(f"ms, {rows} rows\n({BASELINE})" for rows in ROWS)]
        threads = self.costs[0].threads
        return table(
            f"Weight formats on the CPU of this machine, threads {threads}, not on a board: {self.expert}",
            [*heads, f"slower than {BASELINE}\nhere at rows"],
            [_cells(cost) for cost in self.costs],
        )

    def show(self, display: Console) -> None:
        if self.costs:
            display.print(self.table())


def split_costs(job: SplitJob, display: Console, *, read_weights: bool) -> SplitCosts:
    """Measures one expert of the first layer in each of int8 and int4 that a node of the job stores; seconds for each.

    read_weights: the checkpoint's first expert, or random normal weights of its shape, of which the errors differ from
    the model's. Raises CheckpointError, as reading and encoding do.
    """
    layer = job.source.layers[0]
    formats = sorted({job.weight_format(device) for device in job.devices} - set(FLOAT_NAMES), reverse=True)
    named = f"expert 0 of {layer.path}" if read_weights else f"random weights in the shape of {layer.path}"
    if not formats:
        return SplitCosts((), named)
    with display.status(f"measuring {' and '.join(formats)}"):
        if read_weights:
            tensors: Tensors = {part: _whole(pieces) for part, pieces in canonical_expert(job, layer, 0).items()}
        else:
            random = torch.Generator().manual_seed(0)
            shapes = layer.spec.shapes().items()
            tensors = {part: RANDOM_SCALE * torch.randn(shape, generator=random) for part, shape in shapes}
        return SplitCosts(tuple(format_cost(layer.spec, tensors, fmt) for fmt in formats), named)


def _whole(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _cells(cost: FormatCost) -> list[str]:
    times = zip(cost.speed.milliseconds, cost.speed.baseline_milliseconds, strict=True)
    slower = ", ".join(map(str, cost.slower_at())) or "-"
    return [
        *(cost.weight_format, f"{cost.expert_bytes / 1e6:.4g} ({cost.baseline_bytes / 1e6:.4g})"),
        *(f"{cost.relative_error:.2g}", *(f"{ours:.3g} ({theirs:.3g})" for ours, theirs in times), slower),
    ]
