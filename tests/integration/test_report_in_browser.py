"""The report in a real browser: every figure is drawn, nothing is complained of, nothing is asked of a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reported_runs import write_run

pytest.importorskip("duckdb")
pytest.importorskip("vl_convert")

from testbed.report import build
from testbed.report.data import RunData

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--enable-logging=stderr",
    "--virtual-time-budget=60000", "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking",
)  # fmt: skip
MARKS = {"path", "rect", "line", "text", "circle"}
NOT_RUN_HERE = "no chromium here: apt-get install chromium (Debian) draws the page"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NOT_RUN_HERE)


class Drawn(HTMLParser):
    """Counts, by figure, the marks in its SVG that show data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.marks: dict[str, int] = {}
        self.settled: dict[str, str | None] = {}
        self._figure, self._depth, self._in_mark = "", 0, 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        if "data-figure" in of:
            self._figure = of["data-figure"] or ""
            self.marks[self._figure], self.settled[self._figure] = 0, of.get("data-drawn")
        if tag == "section":
            self._figure = ""
        if tag == "g":
            self._depth += 1
            if not self._in_mark and re.search(r"mark-\w+ role-mark ", f"{of.get('class')} "):
                self._in_mark = self._depth
        elif self._figure and self._in_mark and tag in MARKS:
            self.marks[self._figure] += 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "g":
            self._in_mark = 0 if self._in_mark == self._depth else self._in_mark
            self._depth -= 1


def opened(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's DOM once it has come to rest, and what it wrote to the console."""
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    return RunData(write_run(tmp_path_factory.mktemp("run"), lost=2, power_w=(5.0, 7.0, 6.0)))


def test_every_figure_is_drawn_and_the_console_stays_clean(data: RunData, tmp_path: Path) -> None:
    figures = build.figures_of(data)
    page = build.write_page(data, figures, tmp_path / "report.html")
    dom, console = opened(page, tmp_path / "profile")
    drawn = Drawn(dom)
    assert console == []
    assert drawn.settled == {figure.name: "yes" for figure in figures}
    assert all(count > 0 for count in drawn.marks.values()), drawn.marks


def test_a_page_that_asks_a_network_or_fails_would_be_noticed(data: RunData, tmp_path: Path) -> None:
    page = build.write_page(data, build.figures_of(data)[:1], tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</main>", '<script>fetch("http://192.0.2.1/x").catch(() => 0)</script></main>'))
    _, console = opened(page, tmp_path / "profile")
    assert any("Content Security Policy" in line for line in console)
