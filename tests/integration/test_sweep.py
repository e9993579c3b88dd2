"""`testbed sweep` over a Ray cluster of two nodes, and over the whole testbed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from testbed.cli import main
from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.runlog.reader import read_manifest
from testbed.sweep.grid import load_grid
from testbed.sweep.points import Asked
from testbed.sweep.ray_pool import ray_cluster
from testbed.sweep.runner import run_sweep

RUN_FILE = """
name = "small"
policy = [{ name = "topk" }, { name = "wlr", theta = 0.2 }]
[workload]
score_prompts = 1
score_tokens = 16
generate_prompts = 0
"""
DEVICES = """
[placement]
jetson-0 = [0, 1, 2, 3]
jetson-1 = [4, 5, 6, 7]
[[device]]
name = "jetson-0"
backend = "numpy"
[[device]]
name = "jetson-1"
backend = "numpy"
"""
LASTS_S = 0.3  # tasks that end at once all run on one node


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with a core each."""
    pytest.importorskip("ray", reason="spreads sweeps: pip install 'wdmoe-testbed[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


def test_the_points_are_spread_over_the_nodes_and_written_here(two_nodes: str, tmp_path: Path) -> None:
    def where_it_ran(config: RunConfig) -> Mapping[str, Any]:
        import ray

        time.sleep(LASTS_S)
        if config.seed == 3:
            raise ValueError("not this one")
        node = ray.get_runtime_context().get_node_id()
        row = {
            "policy": "topk",
            "params": {},
            "prefill_block_p50_s": 0.1,
            "perplexity": 14.0,
            "seed_there": config.seed,
        }
        return {"kind": "simulated", "node": node, "rows": [row]}

    (tmp_path / "run.toml").write_text(RUN_FILE + DEVICES)
    grid = load_grid(tmp_path / "run.toml", (), ["seed=1,2,3,4,5,6"])
    with ray_cluster(two_nodes) as execute:
        results = run_sweep(grid, Asked("simulated"), tmp_path / "out", where_it_ran, execute, tell=lambda _: None)
    assert [row["seed_there"] for row in results.rows] == [1, 2, 4, 5, 6]
    assert [failure["reason"] for failure in results.failed] == ["ValueError: not this one"]
    kept = [json.loads(path.read_text()) for path in (tmp_path / "out" / "points").iterdir()]
    assert len({point["document"]["node"] for point in kept if point["document"]}) == 2


def test_what_answers_but_is_no_cluster_is_told_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="spreads sweeps: pip install 'wdmoe-testbed[ray]'")
    monkeypatch.setattr("testbed.sweep.ray_pool.HEALTHY_WITHIN_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no healthy Ray cluster"), ray_cluster(address):
            pass


@pytest.mark.torch
def test_a_measured_point_is_a_run_with_its_log_beside_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    (tmp_path / "run.toml").write_text(RUN_FILE + DEVICES)
    arguments = ["sweep", str(tmp_path / "run.toml"), "--measured", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--axis", "wire.down=fp16", "--json"]) == 0
    document = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert [(row["kind"], row["wire.down"], row["policy"]) for row in document["rows"]] == [
        ("measured", "fp16", "topk"),
        ("measured", "fp16", "wlr"),
    ]
    (run_dir,) = (tmp_path / "out" / "runs").iterdir()
    assert read_manifest(run_dir)["config"]["wire"]["down"] == "fp16"
    assert (tmp_path / "out" / "pareto.svg").exists()


@pytest.mark.torch
def test_a_simulated_point_is_what_testbed_simulate_says(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    file = Path(__file__).parents[2] / "configs" / "paper.toml"
    quick = ["--set", "workload.score_prompts=1", "--set", "workload.score_tokens=16", "--draws", "20", "--json"]
    assert main(["simulate", str(file), *quick]) == 0
    simulated = json.loads(capfd.readouterr().out.splitlines()[-1])["rows"]
    assert main(["sweep", str(file), *quick, "--axis", "wire.down+wire.up=int8", "--out", str(tmp_path)]) == 0
    swept = json.loads(capfd.readouterr().out.splitlines()[-1])["rows"]
    assert [{key: row[key] for key in simulated[0]} for row in swept] == simulated
