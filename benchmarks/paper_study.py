"""Every simulated figure of docs/paper.md: `python benchmarks/paper_study.py`, in the repository's root.

Latencies are simulated: Eq. 6 in 500 draws of ten placements of configs/paper.toml, the same for every policy.
Perplexity and accuracy are measured in this process, with the demo model in the same placements. Prints the tables,
writes the figures (PNG, SVG) and what they show (study.json) into docs/figures. `--redraw` draws study.json anew.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from paper_figures import write_figures
from paper_tables import Rows, print_tables

from testbed.channel.radio import placements
from testbed.config import PolicySpec, RunConfig, load_run_file
from testbed.experiment.emulation import row_bytes
from testbed.experiment.model_split import split_model
from testbed.policies.loading import make_policy
from testbed.simulation.allocation import Allocation
from testbed.simulation.draws import draw_channel
from testbed.simulation.kernels import EQ8_S
from testbed.simulation.montecarlo import Simulated, simulate_policy
from testbed.simulation.quality import ModelInProcess
from testbed.simulation.results import policy_row
from testbed.simulation.routing import pack

ROOT = Path(__file__).parents[1]
RUN_FILE, FIGURES, STUDY = ROOT / "configs" / "paper.toml", ROOT / "docs" / "figures", "study.json"
PLACEMENTS = 10
THETAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
BUDGETS = (0.01, 0.02, 0.04, 0.05, 0.1)
MEMORY_BYTES_PER_S = np.geomspace(205e9, 26e9, 8)  # Jetson boards, AGX Orin down to Nano, beside the paper's FLOP/s

TOPK, ALLOCATED = PolicySpec(name="topk"), PolicySpec(name="topk", bandwidth="optimal")
JOINT = PolicySpec(name="joint", budget=0.05)


def wlr(theta: float, **keys: Any) -> PolicySpec:
    return PolicySpec(**{"name": "wlr", "theta": theta, **keys})


POLICIES = [
    TOPK,
    *(PolicySpec(name="topk", bandwidth="optimal", period=period) for period in ("block", "prompt", "static")),
    PolicySpec(name="topk", bandwidth="proportional"),
    *(wlr(theta) for theta in THETAS),
    *(wlr(theta, bandwidth="optimal") for theta in (0.1, 0.2, 0.3)),
    *(PolicySpec(name="drop_late", k_min=1, after_s=after_s) for after_s in (0.0, 0.005, 0.01, 0.02)),
    *(PolicySpec(name="load_aware", budget=budget) for budget in BUDGETS),
    *(PolicySpec(name="substitute", budget=budget) for budget in (0.02, 0.05)),
    *(PolicySpec(name="joint", budget=budget) for budget in BUDGETS),
]
READINGS_OF_ALGORITHM_1 = [
    TOPK,
    *(
        wlr(theta, name=name)
        for name in ("wlr", "examples.readings:WLRAtMost", "examples.readings:WLRSoftmax")
        for theta in (0.0, 0.1, 0.2, 0.3, 0.5)
    ),
]


class Setting:
    """The run file with some keys changed: its model, its routing, and its draws of every placement."""

    def __init__(self, draws: int, overrides: Sequence[str] = (), in_area: bool = False) -> None:
        config = load_run_file(RUN_FILE, overrides)
        self.config = config
        split_dir, self.manifest = split_model(config)
        prompts = config.workload.score_prompts
        placed = [placement(config, number, in_area=in_area) for number in range(PLACEMENTS)]
        self.channels = [draw_channel(c, self.manifest, draws // PLACEMENTS, prompts) for c in placed]
        self._scored = [draw_channel(c, self.manifest, prompts, prompts) for c in placed]
        self._model = ModelInProcess(config, split_dir, self.manifest)
        self.blocks = self._model.routing(self._scored[0])
        self.packed = pack(self.blocks)

    def rows(self, specs: Iterable[PolicySpec], *, quality: bool = True) -> Rows:
        """A row per policy, the first one the reference: `policy_row`, and the spread over single placements."""
        rows: Rows = []
        reference: list[Simulated] = []
        for spec in specs:
            policy, allocation = make_policy(spec.name, spec.params), Allocation.of(spec)
            mine = [simulate_policy(policy, allocation, self.blocks, self.packed, c) for c in self.channels]
            reference = reference or mine
            found = self._quality(spec) if quality else None
            about = {"policy": spec.name, "params": spec.params, "bandwidth": spec.bandwidth, "period": spec.period}
            row = policy_row(about, mine, reference, self.packed, row_bytes(self.config, self.manifest), found)
            rows.append(asdict(row) | single_placements(mine, reference))
        return rows

    def median_snr_db(self) -> float:
        """Of all links at the even split, both ways."""
        snr_hz = np.median([channel.snr_hz_DWN for channel in self.channels])
        return float(10 * np.log10(snr_hz * self.channels[0].devices / self.channels[0].bandwidth_hz))

    def air_ms(self) -> dict[str, float]:
        """Milliseconds on the air, both ways, in the median: a decoded token, and a prefill's slowest device."""
        token_ms, block_ms = [], []
        for channel in self.channels:
            air_ms_DN = 1e3 * channel.air_row_s_DBN(None)[:, 0]
            rows_BN = [np.bincount(b.routing.expert_TK.ravel(), minlength=channel.devices) for b in self.blocks]
            token_ms.append(air_ms_DN[:, self.packed.expert_TK].max(axis=2))
            block_ms.append((air_ms_DN[:, None] * np.array(rows_BN)).max(axis=2))
        return {"decode": float(np.median(token_ms)), "prefill": float(np.median(block_ms))}

    def _quality(self, spec: PolicySpec) -> tuple[float, float]:
        """Perplexity (geometric mean) and accuracy over the placements; the text is the same in each."""
        policy, allocation = make_policy(spec.name, spec.params), Allocation.of(spec)
        found = [self._model.score(policy, allocation, channel) for channel in self._scored]
        return math.exp(np.mean([np.log(q.perplexity) for q in found])), float(np.mean([q.accuracy for q in found]))


def placement(config: RunConfig, number: int, *, in_area: bool) -> RunConfig:
    """The run file with its seeds plus `number`, as `testbed simulate --placements` has it.

    in_area: the same draws, uniform in area between the same two distances.
    """
    radio, devices = config.radio, config.devices
    if radio is None or radio.placement is None:
        raise SystemExit(f"{RUN_FILE}: needs [radio.placement]")
    drawn = radio.placement.model_copy(update={"seed": radio.placement.seed + number})
    changed: dict[str, Any] = {"placement": drawn}
    if in_area:
        least, most = drawn.min_m, drawn.max_m
        fraction_N = (placements(drawn, len(devices)) - least) / (most - least)
        metres_N = np.sqrt(least**2 + fraction_N * (most**2 - least**2))
        devices = tuple(d.model_copy(update={"distance_m": m}) for d, m in zip(devices, metres_N, strict=True))
        changed["placement"] = None
    update = {"seed": config.seed + number, "radio": radio.model_copy(update=changed), "devices": devices}
    return config.model_copy(update=update)


def single_placements(mine: Sequence[Simulated], reference: Sequence[Simulated]) -> dict[str, list[float]]:
    """What each placement by itself shows: the cut of its blocks' summed time, and of its Eq. 8 latency."""
    pairs = list(zip(mine, reference, strict=True))
    return {
        "cut_of_placement": [float(1 - m.block_s_DB.sum() / r.block_s_DB.sum()) for m, r in pairs],
        "eq8_cut_of_placement": [float(1 - m.sums_DS[:, EQ8_S].sum() / r.sums_DS[:, EQ8_S].sum()) for m, r in pairs],
    }


def each_device(key: str, values: Iterable[float]) -> list[str]:
    return [f"device.{n}.{key}={value!r}" for n, value in enumerate(map(float, values))]


ROOFLINE = ["emulation.compute=roofline", *each_device("emulated_memory_bytes_per_s", MEMORY_BYTES_PER_S)]
SETTINGS: dict[str, list[str]] = {
    "this page's setting": [],
    "devices: equal, 3.07 TFLOP/s": each_device("emulated_flops_per_s", [math.sqrt(20e12 * 0.47e12)] * 8),
    "devices: equal, 20 TFLOP/s": each_device("emulated_flops_per_s", [20e12] * 8),
    "distances: uniform in area": [],
    "distances: 20 to 200 m": ["radio.placement.min_m=20", "radio.placement.max_m=200"],
    "distances: 200 to 2000 m": ["radio.placement.min_m=200", "radio.placement.max_m=2000"],
    "compute: roofline": ROOFLINE,
    "medium: tdd": ["radio.medium=tdd"],
    "medium: shared": ["radio.medium=shared"],
    "fading: none": ["radio.fading=none"],
    "fading: Rician, K 6 dB": ["radio.fading=rician"],
    "noise figure: 0 dB": ["radio.noise_figure_db=0"],
    "noise figure: 20 dB": ["radio.noise_figure_db=20"],
    "values: fp16 (16 bit)": ["wire.down=fp16", "wire.up=fp16"],
}
NOISE_FIGURES_DB = (0, 7, 12, 17, 22, 27, 32, 37)  # every link weaker alike
WEAKER = 20  # dB, of the second curve in the figure after the paper's Fig. 3


def study(draws: int) -> dict[str, Any]:
    """All that the page quotes."""
    ours = Setting(draws)
    weak = Setting(draws, [f"radio.noise_figure_db={WEAKER}"])
    found = {
        "draws": draws,
        "placements": PLACEMENTS,
        "policies": ours.rows(POLICIES),
        "algorithm_1": ours.rows(READINGS_OF_ALGORITHM_1),
        "weaker": weak.rows([TOPK, *map(wlr, THETAS)], quality=False),
        "air_ms": ours.air_ms(),
        "settings": settings_rows(draws),
        "snr": snr_rows(draws),
    }
    return json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.5g}"))


def settings_rows(draws: int) -> Rows:
    """The reference policies under each choice that the paper leaves to its reader."""
    rows: Rows = []
    for name, overrides in SETTINGS.items():
        shared = "radio.medium=shared" in overrides  # no band to share out
        setting = Setting(draws, [*(["policy=[{name='topk'}]"] if shared else []), *overrides], "in area" in name)
        specs = [TOPK, wlr(0.2), *([] if shared else [ALLOCATED, JOINT])]
        rows += [{"setting": name, **row} for row in setting.rows(specs)]
    return rows


def snr_rows(draws: int) -> Rows:
    """WLR 0.2 on weaker and weaker links, for unequal and for equal devices."""
    rows: Rows = []
    for devices, keys in (("0.47 to 20 TFLOP/s", []), ("all 20 TFLOP/s", SETTINGS["devices: equal, 20 TFLOP/s"])):
        for noise_db in NOISE_FIGURES_DB:
            setting = Setting(draws, [*keys, f"radio.noise_figure_db={noise_db}"])
            about = {"devices": devices, "noise_figure_db": noise_db, "snr_db": setting.median_snr_db()}
            rows.append(about | setting.rows([TOPK, wlr(0.2)], quality=False)[1])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500, help="of the channel, over all placements (default 500)")
    parser.add_argument("--redraw", action="store_true", help="only draw what docs/figures/study.json says")
    asked = parser.parse_args()
    if not asked.redraw:
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / STUDY).write_text(json.dumps(study(asked.draws)) + "\n", encoding="utf-8")
    found = json.loads((FIGURES / STUDY).read_text(encoding="utf-8"))
    print_tables(found)
    for path in write_figures(found, FIGURES):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
