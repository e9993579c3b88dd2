"""A recorder, a sealer and `testbed logs recover` are killed before every single step that touches a file."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pyarrow as pa
import pytest
from kill_steps import NEVER, RunKilled, killed_runs

from testbed.cli import main
from testbed.runlog.catalog import is_recorded
from testbed.runlog.columns import ROUND_COLUMNS
from testbed.runlog.reader import losses, read_events, read_table
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import DAMAGED, EVENTS, SEGMENT, TABLES
from testbed.runlog.seal import seal_run
from testbed.runlog.segment import read_segment
from testbed.runlog.segment_header import PREAMBLE

DEVICES, TOKENS, ROUNDS, SEGMENT_ROWS = 2, 2, 3, 4  # two rounds fit into a segment
TORN, ENDS = Path("rounds-0000.seg"), (SEGMENT, DAMAGED)
FEW = 25  # a kill at fewer steps than this would mean that the steps are no longer seen


def record(folder: str, acknowledged: str) -> None:
    """Record a few rounds, and add a byte to a file once one is recorded."""
    _recorded(Path(folder), Path(acknowledged))


def record_and_die(folder: str) -> None:
    _recorded(Path(folder), None)
    os.kill(os.getpid(), signal.SIGKILL)


def _recorded(run_dir: Path, acknowledged: Path | None) -> Recorder:
    rows = {c.name: 0 for c in ROUND_COLUMNS if not c.nullable and c.name not in ("device", "tokens")}
    pairs = dict.fromkeys(("expert", "asked", "weight", "kept", "device", "final_weight"), [[0, 0]] * TOKENS)
    recorder = Recorder(run_dir, "run", ["a", "b"], top_k=2, experts=0, segment_rows=SEGMENT_ROWS)
    for number in range(ROUNDS):
        recorder.record_round({**rows, "round": number, "dilation": 1}, {**pairs, "orphaned": False})
        if acknowledged is not None:
            with acknowledged.open("ab", buffering=0) as file:
                file.write(b".")
        recorder.event("done", round=number)
    recorder.flush()
    return recorder


def seal(folder: str) -> None:
    seal_run(Path(folder))


def seal_until(folder: str, written_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (written_bytes, resource.RLIM_INFINITY))
    seal_run(Path(folder))


def recover(folder: str) -> None:
    if main(["logs", "recover", folder]):
        raise SystemExit(1)


@pytest.fixture(scope="module")
def run_killed() -> Iterator[RunKilled]:
    with killed_runs(Path(__file__).stem) as run:
        yield run


def rounds_of(run_dir: Path, table: str) -> list[int]:
    """Empty where it was killed before there was a file."""
    there = any(run_dir.glob(f"{table}-*.seg")) or any(run_dir.glob(f"{table}-*.parquet"))
    return read_table(run_dir, table)["round"].to_pylist() if there else []


def tables_of(run_dir: Path) -> list[pa.Table]:
    return [read_table(run_dir, table) for table in TABLES]


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a file system: a kill is survived by any, and none of hundreds waits for a disk."""
    memory = Path("/dev/shm")  # noqa: S108  (a folder of its own in it)
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


@pytest.fixture
def left_behind(run_killed: RunKilled, quick_folder: Path) -> Path:
    """The log of a recorder that was killed after its last round."""
    run_dir = quick_folder / "left"
    run_dir.mkdir()
    assert run_killed(NEVER, "record_and_die", str(run_dir)) == -signal.SIGKILL
    assert rounds_of(run_dir, "rounds") == [n for n in range(ROUNDS) for _ in range(DEVICES)]
    (run_dir / "rounds-0001.parquet.tmp").write_bytes(b"PAR1")
    return run_dir


@pytest.fixture
def torn(left_behind: Path) -> Path:
    """The same after a power cut that took one row, and half of an event."""
    path = left_behind / TORN
    content = bytearray(path.read_bytes())
    itemsize = read_segment(path).records.itemsize
    first_byte = PREAMBLE.unpack_from(content)[2]
    content[first_byte + DEVICES * itemsize] ^= 1
    path.write_bytes(content)
    with (left_behind / EVENTS).open("ab") as events:
        events.write(b'{"kind": "tor')
    return left_behind


def there(run_dir: Path, end: str) -> bool:
    return (run_dir / TORN.with_suffix(end)).exists()


def kills(step: int, run_dir: Path, quick_folder: Path) -> Iterator[Path]:
    """A copy of the folder for a kill at this step."""
    copy = quick_folder / f"step-{step}"
    shutil.copytree(run_dir, copy)
    yield copy
    shutil.rmtree(copy)


def test_a_recorder_killed_before_any_step_loses_no_recorded_row(run_killed: RunKilled, quick_folder: Path) -> None:
    for step in count(1):
        run_dir, acknowledged = quick_folder / str(step), quick_folder / f"{step}.done"
        run_dir.mkdir()
        code = run_killed(step, "record", str(run_dir), str(acknowledged))
        assert code in (0, -signal.SIGKILL)
        whole = acknowledged.stat().st_size if acknowledged.exists() else 0
        before = {table: rounds_of(run_dir, table) for table in TABLES}
        for table, each in (("rounds", DEVICES), ("tokens", TOKENS)):
            there = len(before[table]) // each
            assert before[table] == [n for n in range(there) for _ in range(each)], (step, table)
            assert whole <= there <= whole + 1, (step, table)
        seal_run(run_dir)
        assert {table: rounds_of(run_dir, table) for table in TABLES} == before, step
        assert not [*run_dir.glob("*.seg*"), *run_dir.glob("*.parquet.tmp")], step
        assert not is_recorded(run_dir)
        if code == 0:
            assert len(read_events(run_dir)) == whole == ROUNDS
            assert step > FEW
            return


def test_a_sealer_killed_before_any_step_leaves_every_row_once_and_the_next_one_ends_its_work(
    run_killed: RunKilled, left_behind: Path, quick_folder: Path
) -> None:
    rows = tables_of(left_behind)
    for step in count(1):
        for run_dir in kills(step, left_behind, quick_folder):
            code = run_killed(step, "seal", str(run_dir))
            assert code in (0, -signal.SIGKILL)
            assert tables_of(run_dir) == rows, step
            seal_run(run_dir)
            assert tables_of(run_dir) == rows, step
            assert not [*run_dir.glob("*.seg*"), *run_dir.glob("*.parquet.tmp")], step
        if code == 0:
            assert step > FEW
            return


def test_a_sealer_killed_before_any_step_after_a_power_cut_counts_the_missing_rows_once_and_keeps_what_is_left_of_them(
    run_killed: RunKilled, torn: Path, quick_folder: Path
) -> None:
    with pytest.warns(UserWarning, match="never reached the disk"):
        rows = tables_of(torn)
    assert [table.num_rows for table in rows] == [DEVICES * (ROUNDS - 1), TOKENS * ROUNDS]
    for step in count(1):
        for run_dir in kills(step, torn, quick_folder):
            code = run_killed(step, "seal", str(run_dir))
            assert code in (0, -signal.SIGKILL)
            assert losses(run_dir, *TABLES).missing == DEVICES, step
            assert any(read_segment(run_dir / f"rounds-0000{end}").remains for end in ENDS if there(run_dir, end)), step
            seal_run(run_dir)
            assert tables_of(run_dir) == rows, step
            assert losses(run_dir, *TABLES).missing == DEVICES, step
            assert [event["part"] for event in read_events(run_dir) if event["kind"] == "rows_missing"] == [TORN.stem]
            assert read_segment(run_dir / TORN.with_suffix(DAMAGED)).missing == DEVICES, step
            assert not [*run_dir.glob("*.seg*"), *run_dir.glob("*.parquet.tmp")], step
        if code == 0:
            assert step > FEW
            return


def test_recover_may_be_killed_again_and_again_and_ends_its_work_at_last(
    run_killed: RunKilled, left_behind: Path
) -> None:
    rows = tables_of(left_behind)
    for step in count(1, 3):
        code = run_killed(step, "recover", str(left_behind))
        assert code in (0, -signal.SIGKILL)
        assert tables_of(left_behind) == rows, step
        if code == 0:
            break
    assert step > 1
    assert not list(left_behind.glob("*.seg*"))


@pytest.mark.parametrize("written_bytes", [1, 100, 4000, 8000])
def test_a_sealer_killed_in_the_middle_of_a_parquet_file_loses_no_row(
    run_killed: RunKilled, left_behind: Path, written_bytes: int
) -> None:
    """The kernel kills it at that very byte: its signal for a file that grows too long is not ignored here."""
    rows = tables_of(left_behind)
    assert run_killed(NEVER, "seal_until", str(left_behind), written_bytes) == -signal.SIGXFSZ
    assert tables_of(left_behind) == rows
    seal_run(left_behind)
    assert tables_of(left_behind) == rows
