"""What every link and every node can do, by itself: rows of several sizes, one device after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bs_node.blocks import Outcome
from bs_node.learning import Learning
from testbed.cli.output import table
from testbed.config import RunConfig
from testbed.errors import NodeError
from testbed.experiment.setup import standing_testbed
from testbed.latency.estimator import Estimator
from testbed.policies.topk import TopK
from testbed.runlog.schema import Status

OVER = {"compute": "rows", "down": "bytes_down", "up": "bytes_up"}  # what each is fitted over
Floats = NDArray[np.float64]


class Line(NamedTuple):
    """fixed_s + per * x, neither negative."""

    fixed_s: float
    per: float

    def at(self, x: float) -> float:
        return self.fixed_s + self.per * x

    def error(self, x_S: Floats, seconds_S: Floats) -> float:
        """Median of |line / measured - 1|."""
        return float(np.median(np.abs((self.fixed_s + self.per * x_S) / seconds_S - 1)))


@dataclass(frozen=True, slots=True)
class DeviceProbe:
    """One device's fit, in seconds of the emulated world where there is one, and how well it says what was measured."""

    device: str
    answered: int
    unanswered: int
    fit: dict[str, Line]  # compute over rows, down and up over bytes
    fit_error: dict[str, float]  # median |fit / measured - 1| of each
    token_s: float  # one row for one expert, there and back
    prefill_s: float  # an even share of a prompt's rows
    samples: list[dict[str, float]]  # rows, bytes and seconds of every block


@dataclass(frozen=True, slots=True)
class ProbeResults:
    run: str
    run_dir: Path
    prefill_tokens: int
    devices: list[DeviceProbe]

    def document(self) -> dict[str, Any]:
        devices = [
            asdict(device) | {"fit": {part: line._asdict() for part, line in device.fit.items()}}
            for device in self.devices
        ]
        return {
            "run": self.run, "directory": str(self.run_dir), "prefill_tokens": self.prefill_tokens,
            "prefill_block_s": self.slowest("prefill_s"), "decode_block_s": self.slowest("token_s"), "devices": devices,
        }  # fmt: skip

    def slowest(self, what: str) -> float:
        """A block waits for its slowest device."""
        return float(np.nanmax([getattr(device, what) for device in self.devices]))

    def table(self) -> Table:
        heads = [
            "device", "down\nfixed ms", "\nMbit/s", "up\nfixed ms", "\nMbit/s", "node\nfixed ms", "\nms/row",
            "one row\nms", "prefill\nms/block", "fit off by\nnode / down / up", "answers",
        ]  # fmt: skip
        return table(f"Probe {self.run}", heads, [_cells(device) for device in self.devices])

    def notes(self) -> list[str]:
        prefill_ms, token_ms = (1e3 * self.slowest(what) for what in ("prefill_s", "token_s"))
        return [
            f"a prefill block of {self.prefill_tokens} tokens, evenly spread, should take {prefill_ms:.1f} ms, "
            f"a decoded token's at most {token_ms:.1f} ms",
            f"one-way times: as the comparison of the clocks has them; every sample: {self.run_dir / 'probe.json'}",
        ]


def _cells(probe: DeviceProbe) -> list[str]:
    compute, *ways = (probe.fit[part] for part in OVER)
    link = [[f"{1e3 * way.fixed_s:.2f}", f"{8e-6 / way.per:.1f}" if way.per > 0 else "-"] for way in ways]
    return [
        probe.device, *link[0], *link[1], f"{1e3 * compute.fixed_s:.2f}", f"{1e3 * compute.per:.3f}",
        f"{1e3 * probe.token_s:.2f}", f"{1e3 * probe.prefill_s:.1f}",
        " / ".join(f"{100 * probe.fit_error[part]:.0f} %" for part in OVER),
        f"{probe.answered}/{probe.answered + probe.unanswered}",
    ]  # fmt: skip


def run_probe(
    config: RunConfig,
    *,
    config_path: Path,
    out: Path | None,
    insecure: bool,
    rows_list: Sequence[int],
    repeats: int,
    progress: Callable[[str, int, int], None],
) -> ProbeResults:
    """Measure every device of a run file. Raises WdmoeError for what a user can mend."""
    with standing_testbed(config, [TopK()], config_path=config_path, out=out, insecure=insecure) as (station, run_dir):
        estimator = Estimator(len(config.devices), *station.row_bytes)
        learning, prober = Learning(estimator, station.nodes), station.prober()  # it compares the clocks
        probes = []
        for index, device in enumerate(config.devices):
            outcomes: list[Outcome] = []
            for done, found in enumerate(prober.sweep([index], rows_list, repeats), start=1):
                progress(device.name, done, repeats * len(rows_list))
                learning.answered([outcome for outcome in found if outcome.status is Status.ANSWERED])
                outcomes += found
            rows = max(1, round(config.workload.score_tokens * station.top_k / len(config.devices)))
            probes.append(summed_up(device.name, outcomes, rows))
        results = ProbeResults(run_dir.name, run_dir, config.workload.score_tokens, probes)
        (run_dir / "probe.json").write_text(json.dumps(results.document(), indent=1))
    return results


def summed_up(device: str, outcomes: Sequence[Outcome], prefill_rows: int) -> DeviceProbe:
    """`prefill_rows`: an even share of a prompt's rows, for one expert. Raises NodeError where nothing was answered."""
    samples = [sample(outcome) for outcome in outcomes if outcome.status is Status.ANSWERED]
    if not samples:
        raise NodeError(f"{device} answered none of {len(outcomes)} blocks: see events.jsonl of this run")
    column = {name: np.array([each[name] for each in samples]) for name in samples[0]}
    lines = {part: fit_line(column[over], column[f"{part}_s"]) for part, over in OVER.items()}
    errors = {part: line.error(column[OVER[part]], column[f"{part}_s"]) for part, line in lines.items()}
    row_bytes = {part: float(np.median(column[OVER[part]] / column["rows"])) for part in ("down", "up")}

    def seconds(rows: int) -> float:
        return lines["compute"].at(rows) + sum(lines[way].at(rows * row_bytes[way]) for way in ("down", "up"))

    return DeviceProbe(
        device, len(samples), len(outcomes) - len(samples), lines, errors, seconds(1), seconds(prefill_rows), samples
    )


def fit_line(x_S: Floats, seconds_S: Floats) -> Line:
    """Through the median of each size, each weighed by its own magnitude: relative errors count."""
    sizes = np.unique(x_S)
    medians = np.array([np.median(seconds_S[x_S == size]) for size in sizes])
    if len(sizes) == 1:
        return Line(0.0, float(medians[0] / sizes[0]))
    per, fixed_s = np.polyfit(sizes, medians, 1, w=1 / medians)
    if fixed_s < 0:
        return Line(0.0, float(np.average(medians / sizes)))
    return Line(float(fixed_s), 0.0) if per < 0 else Line(float(fixed_s), float(per))


def sample(outcome: Outcome) -> dict[str, float]:
    """One block, in seconds of the emulated world."""
    real_ns = outcome.dilation * 1e9
    node_ns = (outcome.node_sent_ns or 0) - (outcome.node_received_ns or 0)
    return {
        "rows": outcome.block.rows,
        "bytes_down": outcome.bytes_down,
        "bytes_up": outcome.bytes_up,
        "compute_s": node_ns / real_ns,
        "down_s": (outcome.down_ns or np.nan) / real_ns,
        "up_s": (outcome.up_ns or np.nan) / real_ns,
    }
