from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from testbed.cli import main
from testbed.config import RunConfig

RUN_FILE = """
name = "small"
device = [{ name = "jetson-0", distance_m = 10.0 }]
policy = [{ name = "topk" }]
[radio]
[sweep]
"wire.down" = ["int8", "fp32"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN_FILE)
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the simulation is asked for; it fails on bf16."""
    calls: list[dict[str, Any]] = []

    def simulate(config: RunConfig, **options: Any) -> SimpleNamespace:
        calls.append({"down": config.wire.down, **options})
        if config.wire.down == "bf16":
            raise ValueError("not today")
        rows = [{"policy": "topk", "params": {}, "prefill_block_p50_s": 0.01, "perplexity": 14.0}]
        return SimpleNamespace(document=lambda: {"kind": "simulated", "rows": rows})

    module = ModuleType("testbed.simulation.simulate")
    vars(module).update(simulate=simulate, default_draws=lambda _: 1000)
    monkeypatch.setitem(sys.modules, "testbed.simulation.simulate", module)
    return calls


def test_a_sweep_simulates_prints_its_table_and_leaves_a_parquet_file(
    file: Path, asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(file), "--out", str(tmp_path / "out"), "--draws", "50"]) == 0
    assert [(call["down"], call["draws"]) for call in asked] == [("int8", 50), ("fp32", 50)]
    told = capsys.readouterr()
    assert "Sweep small, simulated: 2 points" in told.out
    assert "2/2 wire.down=fp32" in told.err
    assert pq.read_table(tmp_path / "out" / "sweep.parquet").num_rows == 2


def test_a_sweep_lands_in_the_log_directory_and_ends_with_one_document(
    file: Path, asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", str(file), "--json", "--set", f"log.directory={tmp_path}/logs", "--axis", "seed=1,2"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["directory"] == f"{tmp_path}/logs/sweep-small"
    assert (document["kind"], document["points"], document["new"], len(document["rows"])) == ("simulated", 4, 4, 4)
    assert all(Path(path).is_file() for path in document["written"])
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new"] == 0
    assert [call["draws"] for call in asked] == [1000] * 4


def test_a_failed_point_is_told_and_makes_the_exit_code_1(
    file: Path, asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["sweep", str(file), "--out", str(tmp_path / "out"), "--axis", "wire.down=bf16,int8"]
    assert main(arguments) == 1
    assert "failed: wire.down=bf16: ValueError: not today" in capsys.readouterr().out
    assert main(arguments) == 1
    assert [call["down"] for call in asked] == ["bf16", "int8", "bf16"]


@pytest.mark.parametrize("option", [["--draws", "10"], ["--ray", "auto"]])
def test_what_is_for_simulated_points_is_refused_for_measured_ones(
    option: list[str], file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(file), "--measured", *option]) == 2
    assert f"{option[0]}: is for simulated points" in capsys.readouterr().err


def test_without_the_plotting_library_the_rest_is_there_and_a_note_says_what_to_install(
    file: Path,
    asked: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "pip install 'wdmoe-testbed[plots]'" in capsys.readouterr().out
    assert not (tmp_path / "out" / "pareto.png").exists()


def test_without_ray_one_line_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["sweep", str(file), "--ray", "10.0.0.1:6379"]) == 2
    assert capsys.readouterr().err == "error: --ray: Ray is not installed: pip install 'wdmoe-testbed[ray]'\n"


def test_a_ray_cluster_that_is_not_there_is_one_line_at_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = f"127.0.0.1:{server.getsockname()[1]}"
    assert main(["sweep", str(file), "--ray", free]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --ray {free}: nothing answers there (")
    assert "start one with `ray start --head`" in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("address", ["here", "ray://10.0.0.1:10001", "10.0.0.1:", ":6379"])
def test_an_address_that_is_none_is_refused(
    address: str, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    assert main(["sweep", str(file), "--ray", address]) == 2
    assert f"--ray {address}: write HOST:PORT" in capsys.readouterr().err
