from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.sweep.grid import Grid, load_grid
from testbed.sweep.plots import COLOURS, SHAPES, axis_value, pareto_spec, plotted, write_plots
from testbed.sweep.points import Asked, point_store
from testbed.sweep.results import SweepResults, write_parquet
from testbed.sweep.runner import run_sweep
from testbed.sweep.table import sweep_notes, sweep_table

RUN_FILE = """
name = "small"
device = [{ name = "jetson-0", distance_m = 10.0 }]
policy = [{ name = "topk" }, { name = "wlr", theta = 0.2 }]
[radio]
[sweep]
"wire.down+wire.up" = ["int8", "fp32"]
"radio.bandwidth_hz" = [50e6, 100e6]
"""
SIMULATED = Asked("simulated")


def row(policy: str, block_s: float, perplexity: float, **more: Any) -> dict[str, Any]:
    return {"policy": policy, "params": {}, "prefill_block_p50_s": block_s, "perplexity": perplexity, **more}


class Simulation:
    """Stands in for one: quicker on more bandwidth, quicker and worse under wlr, and it counts."""

    def __init__(self, fails_at: str = "", interrupted_at: int = -1) -> None:
        self.ran: list[tuple[str, float]] = []
        self.fails_at, self.interrupted_at = fails_at, interrupted_at

    def __call__(self, config: RunConfig) -> Mapping[str, Any]:
        assert config.radio is not None
        if len(self.ran) == self.interrupted_at:
            raise KeyboardInterrupt
        self.ran.append((config.wire.down, config.radio.bandwidth_hz))
        if config.wire.down == self.fails_at:
            raise ValueError("no such\nthing")
        block_s = 1e6 / config.radio.bandwidth_hz * (4 if config.wire.down == "fp32" else 1)
        worse = 0.1 if config.wire.down == "int8" else 0.0
        rows = [row("topk", block_s, 14.0 + worse, decode_token_p50_s=math.nan)]
        rows.append(row("wlr", 0.8 * block_s, 14.5 + worse) | {"params": {"theta": 0.2}})
        return {"kind": "simulated", "perplexity_from": "measured in process", "rows": rows}


def grid(folder: Path, *axes: str) -> Grid:
    file = folder / "run.toml"
    file.write_text(RUN_FILE)
    return load_grid(file, (), axes)


def sweep(folder: Path, simulation: Simulation, *axes: str, asked: Asked = SIMULATED) -> tuple[SweepResults, list[str]]:
    told: list[str] = []
    return run_sweep(grid(folder, *axes), asked, folder / "out", simulation, tell=told.append), told


def test_every_point_is_run_once_and_gives_a_row_per_policy_with_its_axes(tmp_path: Path) -> None:
    simulation = Simulation()
    results, told = sweep(tmp_path, simulation)
    assert simulation.ran == [("int8", 50e6), ("int8", 100e6), ("fp32", 50e6), ("fp32", 100e6)]
    assert [(r["wire.down+wire.up"], r["radio.bandwidth_hz"], r["policy"]) for r in results.rows] == [
        (wire, hz, policy) for wire in ("int8", "fp32") for hz in (50e6, 100e6) for policy in ("topk", "wlr")
    ]
    assert told[0].startswith("1/4 wire.down+wire.up=int8 radio.bandwidth_hz=5e+07: ")
    assert {r["kind"] for r in results.rows} == {"simulated"}
    assert results.rows[0]["decode_token_p50_s"] is None
    assert (results.points, results.new, results.failed) == (4, 4, [])


def test_a_second_call_runs_nothing_and_shows_the_same(tmp_path: Path) -> None:
    first, _ = sweep(tmp_path, Simulation())
    again = Simulation()
    second, told = sweep(tmp_path, again)
    assert again.ran == []
    assert told == [f"4 of 4 points are already in {tmp_path / 'out'}"]
    assert (second.rows, second.new) == (first.rows, 0)


def test_an_interrupt_loses_only_the_point_under_way(tmp_path: Path) -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_sweep(grid(tmp_path), SIMULATED, tmp_path / "out", Simulation(interrupted_at=2), tell=told.append)
    assert told[-1].startswith("2 of 4 points are kept in ")
    assert len(list((tmp_path / "out" / "points").iterdir())) == 2
    again = Simulation()
    results, _ = sweep(tmp_path, again)
    assert again.ran == [("fp32", 50e6), ("fp32", 100e6)]
    assert len(results.rows) == 8


def test_a_point_that_fails_is_recorded_with_its_reason_and_tried_again_the_next_time(tmp_path: Path) -> None:
    results, told = sweep(tmp_path, Simulation(fails_at="int8"))
    assert len(results.rows) == 4
    assert [failure["reason"] for failure in results.failed] == ["ValueError: no such thing"] * 2
    assert told[0].endswith("failed: ValueError: no such thing")
    assert any("failed: wire.down+wire.up=int8" in note for note in sweep_notes(results))
    mended = Simulation()
    results, _ = sweep(tmp_path, mended)
    assert mended.ran == [("int8", 50e6), ("int8", 100e6)]
    assert (len(results.rows), results.failed) == (8, [])


def test_a_point_whose_figures_are_infinite_has_failed(tmp_path: Path) -> None:
    def infinite(_: RunConfig) -> Mapping[str, Any]:
        return {"rows": [row("topk", math.inf, 14.0)]}

    results = run_sweep(grid(tmp_path), SIMULATED, tmp_path / "out", infinite, tell=lambda _: None)
    assert [failure["reason"] for failure in results.failed] == ["ValueError: a figure of it is Infinity"] * 4


def test_a_package_that_is_missing_ends_the_sweep_at_once(tmp_path: Path) -> None:
    def without_torch(_: RunConfig) -> Mapping[str, Any]:
        raise ModuleNotFoundError("no torch", name="torch")

    with pytest.raises(ModuleNotFoundError):
        run_sweep(grid(tmp_path), SIMULATED, tmp_path / "out", without_torch, tell=lambda _: None)


def test_a_damaged_point_is_run_again(tmp_path: Path) -> None:
    sweep(tmp_path, Simulation())
    with point_store(tmp_path / "out", grid(tmp_path), SIMULATED) as store:
        path = store.path(grid(tmp_path).points[1])
    path.write_text(path.read_text()[:40])
    again = Simulation()
    sweep(tmp_path, again)
    assert again.ran == [("int8", 100e6)]


@pytest.mark.parametrize(
    ("axes", "asked", "differs"),
    [
        (["radio.bandwidth_hz=1e8"], SIMULATED, "axes differ"),
        ([], Asked("measured"), "kind differ"),
        ([], Asked("simulated", 100), "draws differ"),
    ],
)
def test_another_sweep_into_the_same_folder_is_refused(
    axes: list[str], asked: Asked, differs: str, tmp_path: Path
) -> None:
    sweep(tmp_path, Simulation())
    with pytest.raises(ConfigError, match=differs):
        sweep(tmp_path, Simulation(), *axes, asked=asked)


def test_a_changed_run_file_is_refused_by_the_name_of_what_changed(tmp_path: Path) -> None:
    sweep(tmp_path, Simulation())
    (tmp_path / "run.toml").write_text("seed = 3\n" + RUN_FILE)
    with pytest.raises(ConfigError, match=r"holds another sweep \(seed differ\); name another folder with --out"):
        run_sweep(load_grid(tmp_path / "run.toml"), SIMULATED, tmp_path / "out", Simulation())


def test_two_sweeps_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    with (
        point_store(tmp_path / "out", grid(tmp_path), SIMULATED),
        pytest.raises(ConfigError, match="a sweep is running here"),
    ):
        sweep(tmp_path, Simulation())


def test_there_is_a_front_per_value_of_the_second_axis_and_what_is_invalid_is_on_none(tmp_path: Path) -> None:
    results, _ = sweep(tmp_path, Simulation())
    on_it = {(r["wire.down+wire.up"], r["policy"]) for r in results.rows if r["pareto"]}
    assert on_it == {("int8", "topk"), ("int8", "wlr"), ("fp32", "topk")}
    assert sum(r["pareto"] for r in results.rows) == 6

    def invalid(_: RunConfig) -> Mapping[str, Any]:
        return {"rows": [row("topk", 1.0, 14.0, valid=False), row("wlr", 2.0, 15.0, valid=True)]}

    results = run_sweep(grid(tmp_path), SIMULATED, tmp_path / "other", invalid, tell=lambda _: None)
    assert [r["pareto"] for r in results.rows] == [False, True] * 4
    assert len(plotted(results)) == 4
    assert any(note.startswith("4 rows are INVALID") for note in sweep_notes(results))


def test_the_parquet_file_has_the_axes_as_columns_and_null_for_the_unknown(tmp_path: Path) -> None:
    results, _ = sweep(tmp_path, Simulation(), "workload.score_tokens=64", "policy.1.theta=0.1,0.3")
    table = pq.read_table(write_parquet(results))
    assert table.num_rows == 16
    assert set(table["wire.down+wire.up"].to_pylist()) == {"int8", "fp32"}
    assert set(table["radio.bandwidth_hz"].to_pylist()) == {50e6, 100e6}
    assert table["decode_token_p50_s"].null_count == 16
    assert json.loads(table["params"].to_pylist()[1]) == {"theta": 0.2}


def test_an_axis_of_text_and_numbers_becomes_text_in_the_parquet_file(tmp_path: Path) -> None:
    results, _ = sweep(tmp_path, Simulation())
    for i, one in enumerate(results.rows):
        one["mixed"] = i if i % 2 else "auto"
    assert pq.read_table(write_parquet(results))["mixed"].to_pylist()[:2] == ['"auto"', "1"]


def test_the_table_names_axes_and_policies_and_says_what_is_unknown(tmp_path: Path) -> None:
    results, _ = sweep(tmp_path, Simulation())
    columns = {str(column.header): list(column.cells) for column in sweep_table(results).columns}
    assert columns["radio.bandwidth_hz"][:3] == ["5e+07", "5e+07", "1e+08"]
    assert columns["policy"][:2] == ["topk", "wlr θ=0.2"]
    assert columns["prefill\nms/block\np50"][:2] == ["20.00", "16.00"]
    assert columns["MB\ndown"][0] == "-"
    assert sweep_notes(results)[0].startswith("latency simulated, perplexity measured in process; 0 points were there")


def test_what_was_emulated_is_said_of_measured_rows(tmp_path: Path) -> None:
    def run(_: RunConfig) -> Mapping[str, Any]:
        about = {"emulated": {"jetson-0": {}}, "links": "emulated by a TCP relay, rayleigh, fdd"}
        return {**about, "rows": [row("topk", 1.0, 14.0)]}

    results = run_sweep(grid(tmp_path), Asked("measured"), tmp_path / "out", run, tell=lambda _: None)
    said = "latency and perplexity measured; compute padded to emulated devices; links: emulated by a TCP relay"
    assert results.document()["provenance"] == said


def test_the_plots_are_a_png_and_an_svg_that_say_what_they_show(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="draws the plots: pip install 'wdmoe-testbed[plots]'")
    results, _ = sweep(tmp_path, Simulation())
    png, svg = write_plots(results)
    assert png.read_bytes().startswith(b"\x89PNG")
    drawn = svg.read_text()
    for text in ("simulated", "perplexity", "(ms)", "50 MHz", "100 MHz", "wlr θ=0.2", "wire.down+wire.up", "fp32"):
        assert text in drawn


def test_a_plot_has_a_panel_per_value_of_the_second_axis_and_every_policy_its_colour(tmp_path: Path) -> None:
    results, _ = sweep(tmp_path, Simulation())
    spec = pareto_spec(results, plotted(results))
    assert spec["facet"]["sort"] == ["50 MHz", "100 MHz"]
    marks = spec["spec"]["layer"][1]["encoding"]
    assert (marks["fill"]["scale"]["domain"], marks["fill"]["scale"]["range"]) == (["topk", "wlr θ=0.2"], COLOURS)
    assert marks["shape"]["scale"] == {"domain": ["int8", "fp32"], "range": SHAPES[:2]}


def test_a_plot_of_one_axis_is_one_panel_and_latencies_far_apart_have_a_logarithmic_axis(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(RUN_FILE.partition("[sweep]")[0])
    one_axis = load_grid(file, (), ["radio.bandwidth_hz=1e6,1e7,1e8"])
    results = run_sweep(one_axis, SIMULATED, tmp_path / "out", Simulation(), tell=lambda _: None)
    spec = pareto_spec(results, plotted(results))
    assert "facet" not in spec
    assert spec["layer"][0]["encoding"]["y"]["scale"]["type"] == "log"
    assert sum(point["pareto"] for point in plotted(results)) == 2


def test_without_both_figures_nothing_is_plotted(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="draws the plots: pip install 'wdmoe-testbed[plots]'")

    def decoded_only(_: RunConfig) -> Mapping[str, Any]:
        return {"rows": [row("topk", math.nan, math.nan)]}

    results = run_sweep(grid(tmp_path), SIMULATED, tmp_path / "out", decoded_only, tell=lambda _: None)
    assert write_plots(results) == []
    assert not any(r["pareto"] for r in results.rows)


@pytest.mark.parametrize(
    ("axis", "value", "text"),
    [
        ("radio.bandwidth_hz", 50e6, "50 MHz"),
        ("radio.bandwidth_hz", 2000, "2000 Hz"),
        ("radio.noise_figure_db", 7.0, "7 dB"),
        ("wire.down+wire.up", "int8", "int8"),
        ("seed", 3, "3"),
    ],
)
def test_a_value_has_the_unit_that_its_key_ends_in(axis: str, value: object, text: str) -> None:
    assert axis_value(axis, value) == text
