"""`testbed watch` on logs written by hand: what it adds up, shows and serves, and how it ends."""

from __future__ import annotations

import io
import json
import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reported_runs import LAYERS, MS, PROMPTS, TOKENS, TOP_K, write_run
from rich.console import Console

from testbed.cli import main
from testbed.errors import ConfigError
from testbed.runlog.reader import read_events, read_manifest, read_table
from testbed.watch.figures import RECENT_ROUNDS, Figures
from testbed.watch.tail import EventTail, TableTail, watch
from testbed.watch.tally import Tally
from testbed.watch.view import line, live_view, view

prometheus_client = pytest.importorskip("prometheus_client")

ROUNDS = PROMPTS * 2 * LAYERS  # of a policy


def seen(run_dir: Path) -> Figures:
    (figures,) = watch(run_dir, 1, once=True)
    return figures


def drawn(figures: Figures) -> str:
    paper = Console(file=io.StringIO(), width=160, highlight=False, markup=False)
    paper.print(view(figures))
    return str(paper.file.getvalue())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, the first rounds of which lose the second device."""
    return write_run(tmp_path_factory.mktemp("logs"), lost=3, power_w=(4.0, 5.0))


def test_a_finished_run_says_so_and_how_far_each_policy_came(ended: Path) -> None:
    figures = seen(ended)
    assert (figures.state, figures.prompts_done, figures.prompts) == ("finished", 2 * PROMPTS, 2 * PROMPTS)
    first, second = figures.policies
    assert (first.rounds, second.rounds) == (ROUNDS, ROUNDS)
    assert first.tokens == read_table(ended, "tokens").num_rows // LAYERS // 2
    assert figures.current is second
    assert f"{ended.name} is finished" in drawn(figures)


def test_what_was_dropped_is_counted_by_policy(ended: Path) -> None:
    first, second = seen(ended).policies
    assert first.pairs == ROUNDS * TOKENS * TOP_K
    assert first.pairs - first.kept_pairs == 3 * TOKENS
    assert first.dropped_fraction == pytest.approx(3 * TOKENS * 0.5 / (ROUNDS * TOKENS))
    assert (second.kept_fraction, second.dropped_fraction) == (1, 0)


def test_requests_and_power_are_told_by_device(ended: Path) -> None:
    near, far = seen(ended).nodes
    assert (near.count("late"), far.count("late"), far.count("answered")) == (0, 3, 2 * ROUNDS - 3)
    assert (near.present, near.joins) == (True, 1)
    assert (near.telemetry.power_w, far.telemetry.power_w) == (5.0, None)
    assert far.last is not None
    assert far.last.waited_for == 1


def test_estimates_stand_beside_what_was_measured(ended: Path) -> None:
    rows = [row for row in read_table(ended, "rounds").to_pylist() if row["device"] == 1 and row["status"] == 1]
    measured_s = sorted((row["bs_received_ns"] - row["bs_sent_ns"]) / 1e9 / row["dilation"] for row in rows)
    last = seen(ended).nodes[1].last
    assert last is not None
    assert last.expected_s == pytest.approx(3e-3)
    assert last.measured_s == pytest.approx((measured_s[(len(rows) - 1) // 2] + measured_s[len(rows) // 2]) / 2)


def test_a_one_way_time_without_a_bound_is_not_told(tmp_path: Path) -> None:
    figures = seen(write_run(tmp_path, clock_bound_ns=-1))
    for node in figures.nodes:
        assert node.last is not None
        assert (node.last.down.one_way_s, node.last.down.bound_s, node.last.down.measured_bits_per_s) == (None,) * 3
    assert " ± " not in drawn(figures).split("Links", 1)[1].split("\n", 1)[1]


def test_one_way_times_are_shown_with_their_bound(ended: Path) -> None:
    last = seen(ended).nodes[0].last
    assert last is not None
    dilation = read_table(ended, "rounds")["dilation"][0].as_py()
    assert last.down.bound_s == pytest.approx(1e-4 / dilation)
    assert " ± " in drawn(seen(ended)).split("Links", 1)[1].split("\n", 1)[1]


def test_times_are_emulated_ones_and_rates_those_of_the_wall_clock(tmp_path: Path) -> None:
    plain, stretched = (seen(write_run(tmp_path / str(x), dilation=x)).last for x in (1.0, 10.0))
    assert plain is not None
    assert stretched is not None
    assert stretched.median_s == pytest.approx(plain.median_s / 10)
    assert stretched.rounds_per_s == plain.rounds_per_s == pytest.approx(1000 / 20)
    assert stretched.tokens_per_s == pytest.approx(TOKENS * 50 / LAYERS)
    assert "×10" in line(seen(tmp_path / "10.0" / "20260102-030405-hand"))


def test_an_aborted_run_opens_and_says_so(tmp_path: Path) -> None:
    with ExitStack() as until_copied:
        live = write_run(tmp_path / "live", prompts=2, closed=False, keep_open=until_copied)
        killed = tmp_path / live.name
        shutil.copytree(live, killed)
    figures = seen(killed)
    assert (figures.state, figures.prompts_done) == ("aborted", 4)
    assert "is aborted (it did not reach its end)" in drawn(figures)


def test_a_run_of_an_older_program_opens(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    for table, names in {
        "rounds": ["dilation", "bandwidth_hz", "asked_down_bits_per_s", "asked_up_bits_per_s", "predicted_up_s"],
        "tokens": ["asked"],
    }.items():
        path = run_dir / f"{table}-0000.parquet"
        pq.write_table(pq.read_table(path).drop_columns(names), path)
    figures = seen(run_dir)
    assert figures.policies[0].kept_fraction == 1
    assert figures.nodes[0].last is not None
    assert figures.nodes[0].last.expected_s is None
    assert figures.nodes[0].last.down.asked_bits_per_s is None
    drawn(figures)


def test_a_run_without_rounds_shows_its_nodes(tmp_path: Path) -> None:
    figures = seen(write_run(tmp_path, prompts=0))
    assert (figures.last, figures.nodes[0].present) == (None, True)
    assert "no round yet" in drawn(figures)
    assert "round" not in line(figures)


def test_events_tell_who_is_there_and_what_is_worth_a_line() -> None:
    facts = {"policies": ["topk"], "devices": ["a", "b"], "config": {}}
    tally = Tally("run", facts)
    joined = {"kind": "node_joined", "realtime_ns": 1, "monotonic_ns": 0}
    lost = {"kind": "node_lost", "how": "disconnected", "realtime_ns": 2, "monotonic_ns": 1}
    tally.add_events([{**joined, "device": "a"}, {**joined, "device": "b"}, {**lost, "device": "b"}, {"kind": "new"}])
    a, b = tally.figures("running").nodes
    assert (a.present, b.present) == (True, False)
    tally.add_events([{**joined, "device": "b"}])
    figures = tally.figures("running")
    assert (figures.nodes[1].present, figures.nodes[1].joins, figures.prompts) == (True, 2, None)
    assert [incident.kind for incident in figures.incidents] == ["node_lost", "node_joined"]
    assert "node_lost b: disconnected" in drawn(figures)


def test_policies_of_one_name_are_told_apart(tmp_path: Path) -> None:
    figures = seen(write_run(tmp_path, policies=["topk", "topk"]))
    assert [policy.policy for policy in figures.policies] == ["0 topk", "1 topk"]
    assert figures.current is figures.policies[1]


@given(cuts=st.lists(st.integers(0, 2 * ROUNDS), max_size=6), tokens_cut=st.integers(0, 2 * ROUNDS * TOKENS))
def test_rows_add_up_alike_in_any_number_of_pieces(ended: Path, cuts: list[int], tokens_cut: int) -> None:
    def pieces(table: pa.Table, at: list[int]) -> Iterator[pa.Table]:
        for start, end in zip([0, *sorted(at)], [*sorted(at), len(table)], strict=True):
            if end > start:
                yield table.slice(start, end - start)

    tally = Tally(ended.name, read_manifest(ended))
    tally.add_events(read_events(ended))
    for rows in pieces(read_table(ended, "rounds"), [2 * cut for cut in cuts]):
        tally.add_rounds(rows)
    for rows in pieces(read_table(ended, "tokens"), [tokens_cut]):
        tally.add_tokens(rows)
    assert tally.figures("finished") == seen(ended)


def test_only_the_last_rounds_count_for_medians(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, prompts=40)
    last = seen(run_dir).last
    assert 2 * 40 * 2 * LAYERS > RECENT_ROUNDS
    assert last is not None
    assert last.p95_s is not None
    assert last.p95_s < 8 * MS / 1e9, "the second policy's blocks of 4 ms, not the first one's of 8"


def test_a_log_that_grows_is_read_on_from_where_it_was(tmp_path: Path) -> None:
    with ExitStack() as until_read:
        run_dir = write_run(tmp_path, closed=False, keep_open=until_read)
        tail, events = TableTail(run_dir, "rounds", ("round", "device"), together=2), EventTail(run_dir)
        assert sum(map(len, tail.new())) == 2 * 2 * ROUNDS
        assert len(events.new()) == len(read_events(run_dir))
        assert list(tail.new()) == events.new() == []
        with (run_dir / "events.jsonl").open("ab") as file:
            file.write(b'{"kind": "half')
            file.flush()
            assert events.new() == []
            file.write(b' a line"}\n')
        assert events.new() == [{"kind": "half a line"}]
    assert list(tail.new()) == [], "sealing changes no row"


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    until_ended = ExitStack()
    run_dir = write_run(tmp_path, closed=False, keep_open=until_ended)
    views = watch(run_dir, 7, once=False, wait=lambda _: until_ended.close())
    assert [figures.state for figures in views] == ["running", "finished"]


def test_a_line_is_printed_where_nobody_watches_and_only_when_it_changed(ended: Path) -> None:
    pipe = io.StringIO()
    with live_view(Console(file=pipe, width=200)) as show:
        show(seen(ended))
        show(seen(ended))
    assert len(pipe.getvalue().splitlines()) == 1
    assert "\x1b" not in pipe.getvalue()
    assert "policy wlr θ=0.2" in pipe.getvalue()


def test_a_terminal_gets_one_view_drawn_anew(ended: Path) -> None:
    terminal = io.StringIO()
    display = Console(file=terminal, force_terminal=True, width=150, height=60, _environ={})
    with live_view(display) as show:
        show(seen(ended))
        show(seen(ended))
    assert terminal.getvalue().count("\x1b[?25h") == 1, "the cursor is back"
    assert "\x1b[2K" in terminal.getvalue(), "the first view is wiped"


@pytest.mark.parametrize("no_colour", [False, True])
def test_a_lost_node_is_red_where_colours_are_wanted(no_colour: bool) -> None:
    tally = Tally("run", {"policies": ["topk"], "devices": ["a"], "config": {}})
    tally.add_events([{"kind": "node_lost", "device": "a", "how": "silent"}])
    terminal = io.StringIO()
    environ = {"NO_COLOR": "1"} if no_colour else {}
    Console(file=terminal, force_terminal=True, color_system="standard", _environ=environ).print(
        view(tally.figures("running"))
    )
    assert ("\x1b[31m" in terminal.getvalue()) is not no_colour


def test_once_prints_the_tables_or_a_document(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["watch", ended.name, "--logs", str(ended.parent), "--once"]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert all(title in told for title in ("is finished", "Nodes", "Links", "Policies so far"))
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (document["run"], document["state"], document["prompts_done"]) == (ended.name, "finished", 2 * PROMPTS)
    assert document["nodes"][1]["last"]["down"]["asked_bits_per_s"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nope"], 6, "no run 'nope'"),
        (["--once", "--prometheus", "0"], 2, "leave one of them out"),
        (["--every", "0"], 2, "--every"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], code: int, said: str, ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", *arguments, "--logs", str(ended.parent)]) == code
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_help_shows_an_example_and_loads_nothing_heavy() -> None:
    heavy = ["numpy", "pyarrow", "rich", "prometheus_client", "torch"]
    code = (
        "import sys; from testbed.cli import main; code = main(['watch', '--help']); "
        f"print('LOADED', *[name for name in {heavy} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "Example: testbed watch" in done.stdout
    assert done.stdout.splitlines()[-1] == "LOADED"


def page_at(address: str) -> str:
    url = urlsplit(address)
    with closing(HTTPConnection(url.netloc, timeout=10)) as connection:
        connection.request("GET", url.path)
        return connection.getresponse().read().decode()


def scraped(address: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(page_at(address))
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def test_prometheus_scrapes_what_is_shown(ended: Path) -> None:
    from testbed.watch.metrics import metrics_endpoint

    figures = seen(ended)
    with metrics_endpoint("127.0.0.1", 0) as (address, show):
        assert scraped(address) == {}
        show(figures)
        found = scraped(address)
    first, far = figures.policies[0], figures.nodes[1]
    assert far.last is not None
    of_first, of_far = ("policy", first.policy), ("device", "far")
    assert found["wdmoe_run_active", ()] == 0
    assert found["wdmoe_rounds_total", (of_first,)] == ROUNDS
    assert found["wdmoe_pairs_kept_total", (of_first,)] == first.kept_pairs
    assert found["wdmoe_gate_mass_dropped_total", (of_first,)] == pytest.approx(first.dropped_mass)
    assert found["wdmoe_requests_total", (of_far, ("outcome", "late"), of_first)] == 3
    assert found["wdmoe_node_present", (of_far,)] == 1
    assert found["wdmoe_node_power_watts", (("device", "near"),)] == 5
    assert found["wdmoe_policy_active", (("policy", "wlr θ=0.2"),)] == 1
    way = (of_far, ("direction", "down"))
    assert found["wdmoe_link_one_way_seconds", way] == pytest.approx(far.last.down.one_way_s)
    assert found["wdmoe_link_one_way_bound_seconds", way] == pytest.approx(far.last.down.bound_s)
    assert ("wdmoe_link_asked_bits_per_second", way) not in found, "unknown is left out, never 0"
    assert not any(math.isnan(value) for value in found.values())


def test_a_port_in_use_is_one_clear_line(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert (
            main(["watch", ended.name, "--logs", str(ended.parent), "--prometheus", str(port)]) == ConfigError.exit_code
        )
    told = capsys.readouterr().err
    assert told.startswith(f"error: --prometheus {port}: cannot listen on 127.0.0.1:{port} (Address already in use)")
    assert len(told.splitlines()) == 1


def test_the_endpoint_is_gone_with_the_command(ended: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", ended.name, "--logs", str(ended.parent), "--prometheus", "0"]) == 0
    address = capsys.readouterr().err.split()[-1]
    with pytest.raises(ConnectionRefusedError):
        page_at(address)
