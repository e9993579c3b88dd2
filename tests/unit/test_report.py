"""The report of a run: its figures' numbers, its page, and runs that are not whole."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported_runs import LAYERS, PREFILL_MS, PROMPTS, write_run

pytest.importorskip("duckdb")
pytest.importorskip("vl_convert")

from testbed.cli import main
from testbed.report import boards, build, estimates, experts, incidents, links, phases, quality, timeline
from testbed.report.data import RunData
from testbed.report.figure import Figure
from testbed.report.page import _inside_script
from testbed.runlog.schema import PHASES

ADDRESS = re.compile(r"""(?:src|href)=["'](?!#|data:)""")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return RunData(write_run(tmp_path_factory.mktemp("whole")))


def values_of(figure: Figure) -> list[dict[str, Any]]:
    assert figure.spec is not None
    values: list[dict[str, Any]] = figure.spec["data"]["values"]
    return values


def page_of(run_dir: Path) -> str:
    data = RunData(run_dir)
    return build.write_page(data, build.figures_of(data), run_dir / "report.html").read_text(encoding="utf-8")


def tell(run_dir: Path, device: str, at_s: float, figures: dict[str, float | None]) -> None:
    """Add a sample of the node's telemetry to the log of a run."""
    stamp_ns = int(at_s * 1e9)
    event = {"realtime_ns": stamp_ns, "monotonic_ns": stamp_ns, "kind": "telemetry", "device": device}
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps({**event, "samples": [{"sampled_ns": stamp_ns, "figures": figures}]}) + "\n")


def head_of(page: str) -> str:
    return page[page.index("<header>") : page.index("</header>")]


def test_a_policy_that_halves_every_block_is_said_to_cut_them_by_about_half(whole: RunData) -> None:
    first, second = quality.policy_figures(whole)
    assert first.block_ms == pytest.approx(PREFILL_MS[0] + 0.5)
    assert second.cut.cut == pytest.approx(1 - (PREFILL_MS[1] + 0.5) / (PREFILL_MS[0] + 0.5))
    assert (first.perplexity, second.perplexity) == (pytest.approx(3.0), pytest.approx(4.0))


def test_every_phase_but_waiting_and_what_lies_within_others_is_in_the_figures_of_where_time_goes() -> None:
    drawn = {phase.column for phase in (*phases.NODE_PHASES, *phases.STATION_PHASES)}
    assert {phase.column for phase in PHASES if phase.column} - drawn == {"wait_ns", "staging_ns", "node_staging_ns"}


def test_bars_of_a_node_add_up_to_its_mean_time(whole: RunData) -> None:
    far = [
        v
        for v in values_of(phases.at_nodes(whole))
        if (v["node"], v["policy"], v["mode"]) == ("far", "topk", "prefill")
    ]
    assert sum(bar["ms"] for bar in far) == pytest.approx(3 * PREFILL_MS[0] / 8 + 3 * 0.02)
    assert far[-1]["end"] == pytest.approx(sum(bar["ms"] for bar in far))


def test_no_one_way_time_is_drawn_without_its_bound(whole: RunData) -> None:
    ways = [v for v in values_of(timeline.figure(whole)) if v["part"] in ("down", "up")]
    assert ways
    assert all(bar["bound_ms"] == pytest.approx(0.1) for bar in ways)
    ways = [v for v in values_of(phases.at_nodes(whole)) if v["part"] in ("down", "up")]
    assert ways
    assert all(bar["bound"] == pytest.approx(0.1) for bar in ways)
    assert all(point["low"] < point["measured"] < point["high"] for point in values_of(links.figure(whole)))


def test_the_timeline_shows_every_round_of_one_prompt_under_both_policies_and_who_was_last(whole: RunData) -> None:
    bars = values_of(timeline.figure(whole))
    last = [bar for bar in bars if bar.get("last")]
    assert {bar["policy"] for bar in bars} == set(whole.policies)
    assert len(last) == 2 * LAYERS
    assert {bar["node"] for bar in last} == {"far"}


def test_a_way_of_unknown_length_is_not_drawn_as_one(tmp_path: Path) -> None:
    data = RunData(write_run(tmp_path, down_ns=-1, up_ns=-1, clock_bound_ns=-1))
    assert {v["part"] for v in values_of(timeline.figure(data))} == {"BS at work", timeline.UNDIVIDED}
    assert not any(v["part"] in ("down", "up") for v in values_of(phases.at_nodes(data)))
    assert "being unknown" in phases.at_nodes(data).finding
    assert links.figure(data).spec is None


def test_estimates_and_measurements_stand_side_by_side(whole: RunData) -> None:
    rows = values_of(estimates.over_time(whole))
    assert {row["expected_ms"] for row in rows} == {3.0}
    assert {row["node"] for row in rows} == {"near", "far"}
    by_node = {row["node"]: row for row in values_of(estimates.errors(whole)) if row["mode"] == "prefill"}
    assert by_node["far"]["p95"] == pytest.approx(PREFILL_MS[0] / 3, abs=1e-4)
    assert by_node["far"]["p05"] == pytest.approx(PREFILL_MS[1] / 3, abs=1e-4)


def test_expert_load_is_counted_from_the_gates_choices(whole: RunData) -> None:
    spec = experts.per_layer(whole).spec
    assert spec is not None
    chosen = {(c["layer"], c["expert"]): c["times_even"] for c in spec["hconcat"][0]["data"]["values"]}
    assert chosen[0, 0] == pytest.approx(1.5)
    assert chosen[1, 3] == pytest.approx(0.5)


def test_boards_that_told_nothing_are_said_to_have_told_nothing(whole: RunData) -> None:
    figure = boards.figure(whole)
    assert figure.spec is None
    assert figure.finding.startswith("No node told")


def test_boards_that_told_their_power_are_drawn(tmp_path: Path) -> None:
    values = values_of(boards.figure(RunData(write_run(tmp_path, power_w=(5.0, 7.0, 6.0)))))
    assert [value["value"] for value in values] == [5.0, 6.0, 7.0]
    assert {value["title"] for value in values} == {"Power of the board (W)"}


def test_what_nodes_told_is_drawn_by_kind_and_what_none_told_is_named(tmp_path: Path) -> None:
    """The hottest of a sample's zones stands for all of them; single rails and fans are left to queries."""
    with ExitStack() as open_run:
        run_dir = write_run(tmp_path, closed=False, keep_open=open_run)
        tell(run_dir, "near", 2.0, {"cpu_c": 46.0, "tj_c": 48.5, "cv0_c": None, "vdd_soc_w": 1.5, "throttled": 0.0})
        tell(run_dir, "far", 2.0, {"gpu_mhz": 306.0, "rss_bytes": 2.0**29, "throttled": 1.0})
        tell(run_dir, "far", 3.0, {"throttled": 1e15})
    figure = boards.figure(RunData(run_dir))
    drawn = [(value["node"], value["title"], value["value"]) for value in values_of(figure)]
    assert drawn == [
        ("far", "GPU clock (MHz)", 306.0),
        ("near", "Hottest zone (°C)", 48.5),
        ("far", "Memory of the node's process (GiB)", 0.5),
    ]
    assert "2 of 2 nodes told" in figure.finding
    assert "The hottest was near's: 48.5 °C." in figure.finding
    assert "Slowed down for heat: far (far in 2 of 2 samples)." in figure.finding
    assert "No node told its power, CPU clock, CPU load, GPU load, memory clock," in figure.finding


@pytest.mark.parametrize(
    ("start", "emulated", "said"),
    [
        ("none", {}, False),
        ("none", {"near": {}}, "figures of the machine that plays them"),
        ("local", {}, "temperature"),
    ],
)
def test_figures_that_are_not_the_devices_own_are_said_to_be_another_machines(
    start: str, emulated: dict[str, Any], said: str | bool, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path)
    tell(run_dir, "near", 2.0, {"cpu_c": 46.0, "cpu_percent": 5.0})
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["config"]["fleet"]["start"], manifest["emulated"] = start, emulated
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    whose = re.findall(r"[^.]*machine[^.]*\.", boards.figure(RunData(run_dir)).finding)
    assert len(whose) == bool(said)
    assert not said or str(said) in whose[0]


def test_figures_that_no_plot_shows_are_left_to_queries(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    tell(run_dir, "near", 2.0, {"vdd_soc_w": 1.5})
    assert boards.figure(RunData(run_dir)).spec is None


def test_a_reply_that_did_not_come_is_counted_and_drawn(tmp_path: Path) -> None:
    data = RunData(write_run(tmp_path, lost=2))
    figure = incidents.figure(data)
    assert "2 late" in figure.finding
    assert [v["node"] for v in values_of(figure) if v["kind"] == "late"] == ["far", "far"]
    assert all(f.spec is not None for f in build.figures_of(data) if f.name != "boards")


def test_a_run_without_losses_says_so(whole: RunData) -> None:
    assert incidents.figure(whole).finding.startswith("All ")


def test_the_page_is_one_file_that_names_no_address_and_asks_for_none(whole: RunData) -> None:
    page = page_of(whole.run_dir)
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not ADDRESS.search(own)
    assert "default-src 'none'" in page
    assert len(page) < 3e6


def test_a_run_that_was_killed_opens_and_says_that_it_was_aborted(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, prompts=PROMPTS - 1)
    head = head_of(page_of(run_dir))
    assert "aborted" in head
    assert "not judged" in head


def test_a_run_that_ended_before_its_first_round_opens_too(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, prompts=0))
    assert "aborted" in head_of(page)
    assert "No request was sent in this run." in page


def test_a_run_that_still_goes_on_opens_from_its_segments(tmp_path: Path) -> None:
    with ExitStack() as running:
        run_dir = write_run(tmp_path, closed=False, keep_open=running)
        assert "still going on" in head_of(page_of(run_dir))


def test_a_whole_run_is_judged(whole: RunData) -> None:
    head = head_of(page_of(whole.run_dir))
    assert ">finished<" in head
    assert ">valid<" in head


def test_runs_older_than_asked_and_measured_rates_open_too(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    [path] = run_dir.glob("rounds-*.parquet")
    table = pq.read_table(path)
    newer = [n for n in table.column_names if n.startswith(("asked_", "measured_")) or n == "bandwidth_hz"]
    pq.write_table(table.drop_columns(newer), path)
    data = RunData(run_dir)
    assert all(figure.spec is not None for figure in build.figures_of(data) if figure.name != "boards")
    assert "no rate was asked" in links.figure(data).finding


def test_names_out_of_the_log_cannot_become_html(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path, devices=("</script><b>x", "far"), policies=("<i>topk", "it's & other")))
    assert "<b>x" not in page
    assert "<i>topk" not in page
    assert "&lt;i&gt;topk" in page


@given(st.text())
def test_json_inside_a_script_has_no_way_out_and_reads_back_as_it_was(text: str) -> None:
    inside = _inside_script(json.dumps({"text": text}, ensure_ascii=False))
    assert "<" not in inside
    assert json.loads(inside) == {"text": text}


def test_every_number_can_be_asked_for_by_logs_query(whole: RunData, capsys: pytest.CaptureFixture[str]) -> None:
    logs = str(whole.run_dir.parent)
    for query in {query for figure in build.figures_of(whole) for query in figure.queries}:
        assert main(["logs", "query", query, "--logs", logs, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(answer["rows"]) == len(whole.rows(query))


def test_the_command_writes_page_and_figures_and_refuses_to_replace_them_unasked(
    whole: RunData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "FIGURES", (quality.figure, boards.figure))
    out, figures = tmp_path / "page.html", tmp_path / "figures"
    call = ["logs", "report", "latest", "--logs", str(whole.run_dir.parent), "--out", str(out), "--json"]
    assert main([*call, "--figures", str(figures)]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    drawn = {figure["name"] for figure in told["figures"] if figure["drawn"]}
    assert {path.name for path in figures.iterdir()} == {f"{name}.{kind}" for name in drawn for kind in ("png", "svg")}
    assert main(call) != 0
    assert "--force" in capsys.readouterr().err
    assert main([*call, "--force"]) == 0
