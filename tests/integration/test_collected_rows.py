"""`testbed logs collect`: rows of nodes, written by the node's own code, beside a run's log."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("duckdb")

from recorded_rounds import OFFSET_NS, Recorded, record_rounds

from jetson_node.rows import RowFiles
from testbed.cli import main
from testbed.errors import RunLogError
from testbed.runlog.catalog import describe_run
from testbed.runlog.collect import FIRST_PROBE, collect, collect_what_is_there
from testbed.runlog.columns import NODE_COLUMNS
from testbed.runlog.manifest import write_manifest
from testbed.runlog.query import LogDatabase
from testbed.runlog.reader import read_manifest, read_table
from testbed.runlog.schema import NODES, Reply, Status
from testbed.wire.messages import ReplyPart, RequestPart

RUN, BOOT = 2**61 + 12345, 1
RESIDENCE_NS = 700_000


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    """A run of three devices; its manifest knows the run's number."""
    (tmp_path / "logs").mkdir()
    done = record_rounds(tmp_path / "logs" / "20250301-120000-made", rounds=40)
    write_manifest(done.folder, {**read_manifest(done.folder), "run_number": str(RUN)})
    return done


def rows_of(recorded: Recorded) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(recorded.folder, "rounds").to_pylist()
    return rows


def keep(files: RowFiles, number: int, received_ns: int, *, run: int = RUN, is_sent: bool = True) -> None:
    """A block of two rows that came then."""
    times = received_ns, received_ns + RESIDENCE_NS, 1, 2, 3, 0, 4
    request = RequestPart(run, number, 0, 0, 0, 1, 2, 64, 64, "fp32", "fp32", [(1, 2)])
    reply = ReplyPart(run, number, 0, 0, 1, 2, 64, 64, "fp32", *times)
    files.computed(reply, request, received_ns + 2, 512, 512)
    if is_sent:
        files.sent()


def node_served(recorded: Recorded, folder: Path, device: int, statuses: Sequence[Status]) -> int:
    """The node's own files of the blocks whose rows at the base station have these statuses; returns their number."""
    files, served = RowFiles(folder, f"device-{device}", BOOT, rows_per_file=7), 0
    for row in rows_of(recorded):
        if row["device"] == device and row["status"] in statuses:
            came_ns = row["node_received_ns"] or row["bs_sent_ns"] + OFFSET_NS * (1 + device) + 50_000
            keep(files, row["round"], came_ns)
            served += 1
    files.close()
    return served


def collected(recorded: Recorded, capsys: pytest.CaptureFixture[str], *folders: Path) -> dict[str, Any]:
    """What the command prints for machines."""
    argv = ["logs", "collect", recorded.folder.name, *map(str, folders), "--logs", str(recorded.folder.parent)]
    assert main([*argv, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return document


def nodes_table(recorded: Recorded) -> pa.Table:
    return pq.read_table(recorded.folder / f"{NODES}.parquet")


def test_replies_that_got_lost_are_found_at_their_node_and_counted(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = [node_served(recorded, tmp_path / f"n{n}", n, list(Status)[1:4]) for n in range(2)]
    document = collected(recorded, capsys, tmp_path / "n0", tmp_path / "n1")
    for device, account in enumerate(document["nodes"][:2]):
        statuses = [status[device] for status in recorded.statuses]
        assert account["node"] == f"device-{device}"
        assert account["served"] == there[device]
        assert account["used"] == statuses.count(Status.ANSWERED)
        assert account["late"] == statuses.count(Status.LATE)
        assert account["lost"] == statuses.count(Status.LOST)
        assert account["only_node"] == account["only_bs"] == account["invalid"] == account["refused"] == 0
    assert sum(account["late"] + account["lost"] for account in document["nodes"]) > 0
    (silent,) = document["nodes"][2:]
    assert (silent["served"], silent["only_bs"]) == (0, sum(row[2] is not Status.IDLE for row in recorded.statuses))
    assert document["rows"] == document["new_rows"] == sum(there)


def test_the_time_until_a_lost_reply_was_sent_is_right_within_its_bound(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node_served(recorded, tmp_path / "n1", 1, [Status.ANSWERED, Status.LATE, Status.LOST])
    account = next(a for a in collected(recorded, capsys, tmp_path)["nodes"] if a["node"] == "device-1")
    true_ms = (RESIDENCE_NS + 50_000) / 10 / 1e6  # emulated time was stretched by ten
    assert account["bound_ms"] > 0
    assert account["ready_ms_p50"] == pytest.approx(true_ms, abs=account["bound_ms"])
    assert account["in_node_ms_p50"] == pytest.approx(RESIDENCE_NS / 10 / 1e6)
    assert account["would_have_taken_ms_p50"] is None  # these rounds predict nothing


def test_collecting_twice_or_from_overlapping_folders_gives_the_same_rows(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = node_served(recorded, tmp_path / "all" / "n0", 0, [Status.ANSWERED])
    shutil.copytree(tmp_path / "all", tmp_path / "copy")
    first = collected(recorded, capsys, tmp_path / "all")
    table = nodes_table(recorded)
    again = collected(recorded, capsys, tmp_path / "copy" / "n0", tmp_path / "all", tmp_path / "copy")
    assert (first["new_rows"], again["new_rows"], again["rows"]) == (count, 0, count)
    assert nodes_table(recorded).equals(table)
    assert again["contradicting"] == 0


def test_nodes_can_be_collected_one_after_the_other(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = [node_served(recorded, tmp_path / f"n{n}", n, [Status.ANSWERED]) for n in (0, 1)]
    for number, count in enumerate(counts):
        assert collected(recorded, capsys, tmp_path / f"n{number}")["new_rows"] == count
    assert nodes_table(recorded).num_rows == sum(counts)


def test_a_row_read_while_its_reply_was_under_way_is_overtaken_by_what_it_became(
    recorded: Recorded, tmp_path: Path
) -> None:
    files = RowFiles(tmp_path / "n", "device-0", BOOT)
    keep(files, 3, 1000, is_sent=False)
    collect(recorded.folder, [tmp_path])
    assert nodes_table(recorded)["reply"].to_pylist() == [Reply.COMPUTED]
    files.sent()
    assert collect(recorded.folder, [tmp_path]).new_rows == 0
    assert nodes_table(recorded)["reply"].to_pylist() == [Reply.SENT]
    files.close()


def test_two_different_rows_of_a_block_are_told_and_both_kept_but_probes_may_share_a_number(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = RowFiles(tmp_path / "n", "device-0", BOOT)
    for received_ns in (1000, 2000):
        keep(files, 3, received_ns)
        keep(files, FIRST_PROBE, received_ns)
    files.close()
    document = collected(recorded, capsys, tmp_path)
    assert (document["rows"], document["contradicting"]) == (4, 1)
    assert [a["probes"] for a in document["nodes"] if a["node"] == "device-0"] == [2]
    assert main(["logs", "collect", recorded.folder.name, "--logs", str(recorded.folder.parent)]) == 0
    assert "1 blocks have two different rows" in capsys.readouterr().out


def test_rows_of_other_runs_stay_where_they_are(recorded: Recorded, tmp_path: Path) -> None:
    files = RowFiles(tmp_path / "n", "device-0", BOOT)
    for number in range(4):
        keep(files, number, 1000, run=RUN + number % 2)
    files.close()
    assert collect(recorded.folder, [tmp_path]).rows == 2
    assert nodes_table(recorded)["round"].to_pylist() == [0, 2]
    assert list((tmp_path / "n").iterdir())


def test_the_table_says_what_the_runs_own_log_knows_of_the_round_and_null_where_it_knows_nothing(
    recorded: Recorded, tmp_path: Path
) -> None:
    files = RowFiles(tmp_path / "n", "device-2", BOOT)
    for number in (0, 39, 40, FIRST_PROBE):
        keep(files, number, 1000)
    files.close()
    collect(recorded.folder, [tmp_path])
    table = nodes_table(recorded)
    assert table.column_names == [column.name for column in NODE_COLUMNS]
    assert table["device"].to_pylist() == [2] * 4
    assert table["node_boot"].to_pylist() == [BOOT] * 4
    assert table["policy"].to_pylist() == [0, 1, None, None]
    assert table["prompt"].to_pylist() == [0, 1, None, None]
    assert table["phase"].to_pylist() == [0, 1, None, None]


def test_files_in_the_runs_own_folder_go_once_they_are_in_the_table(recorded: Recorded) -> None:
    own = recorded.folder / NODES / "device-0"
    count = node_served(recorded, own, 0, [Status.ANSWERED])
    (recorded.folder / NODES / "device-0.log").write_text("started")
    collect_what_is_there(recorded.folder)
    assert nodes_table(recorded).num_rows == count
    assert [path.name for path in (recorded.folder / NODES).iterdir()] == ["device-0.log"]
    assert collect(recorded.folder).rows == count


def test_a_file_that_a_node_still_writes_to_stays_and_its_later_rows_are_collected_later(recorded: Recorded) -> None:
    files = RowFiles(recorded.folder / NODES / "device-0", "device-0", BOOT)
    keep(files, 0, 1000)
    assert collect(recorded.folder).rows == 1
    keep(files, 1, 2000)
    files.close()
    done = collect(recorded.folder)
    assert (done.rows, done.new_rows) == (2, 1)
    assert not list((recorded.folder / NODES).iterdir())


def test_a_damaged_file_is_told_left_out_and_left_where_it_is(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    own = recorded.folder / NODES / "device-0"
    count = node_served(recorded, own, 0, [Status.ANSWERED])
    bad = own / "bad.seg"
    bad.write_bytes(b"WDMOELOG" + bytes(100))
    argv = ["logs", "collect", recorded.folder.name, "--logs", str(recorded.folder.parent)]
    assert main(argv) == RunLogError.exit_code
    told = capsys.readouterr()
    assert f"{count} rows" in told.out
    assert told.err.startswith(f"error: {bad}: ")
    assert len(told.err.splitlines()) == 1
    assert list(own.iterdir()) == [bad]
    assert nodes_table(recorded).num_rows == count
    collect_what_is_there(recorded.folder)  # spoils nothing
    assert "nodes' own rows not collected" in capsys.readouterr().err


def test_a_device_that_the_run_does_not_have_is_left_out(recorded: Recorded, tmp_path: Path) -> None:
    files = RowFiles(tmp_path / "n", "stranger", BOOT)
    keep(files, 0, 1000)
    files.close()
    done = collect(recorded.folder, [tmp_path])
    assert done.rows == 0
    assert "of stranger, which is no device of this run" in str(done.problems[0])


def test_rows_that_found_no_room_are_told_with_their_device(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "n"
    files = RowFiles(folder, "device-0", BOOT, rows_per_file=1)
    keep(files, 0, 1000)
    folder.rename(tmp_path / "moved")
    folder.write_text("in the way, as a full disk would be")
    for number in (1, 2):
        keep(files, number, 1000)
    files.close()
    assert collected(recorded, capsys, tmp_path / "moved")["rows_not_kept"] == {"device-0": 2}


def test_nothing_to_collect_and_a_run_without_a_number_are_told_in_one_line(recorded: Recorded, tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="no rows of nodes; name the folders that they were copied to"):
        collect(recorded.folder)
    with pytest.raises(RunLogError, match="no rows of nodes in this folder"):
        collect(recorded.folder, [tmp_path / "nowhere"])
    facts = read_manifest(recorded.folder)
    del facts["run_number"]
    write_manifest(recorded.folder, facts)
    with pytest.raises(RunLogError, match="no run_number: it was recorded before nodes kept rows"):
        collect(recorded.folder)


def test_a_query_joins_both_sides_and_a_run_without_rows_of_nodes_has_an_empty_table(
    recorded: Recorded, tmp_path: Path
) -> None:
    def ask(sql: str) -> list[tuple[Any, ...]]:
        with LogDatabase([describe_run(recorded.folder)]) as database:
            return list(database.ask(sql).rows)

    assert ask("SELECT count(*) FROM nodes") == [(0,)]
    types = ask("DESCRIBE nodes")
    count = node_served(recorded, tmp_path / "n", 1, [Status.ANSWERED, Status.LATE])
    collect(recorded.folder, [tmp_path])
    assert ask("DESCRIBE nodes") == types
    assert [name for name, *_ in types] == ["run", "policy_name", "device_name", *(c.name for c in NODE_COLUMNS)]
    assert count == sum(row[1] in (Status.ANSWERED, Status.LATE) for row in recorded.statuses)
    both = "SELECT n.device_name, count(*) FROM nodes n JOIN rounds USING (run, round, device, attempt) GROUP BY ALL"
    assert ask(both) == [("device-1", count)]
    assert ask("SELECT count(DISTINCT policy_name) FROM nodes") == [(2,)]
