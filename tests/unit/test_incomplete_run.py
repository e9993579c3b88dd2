"""A run whose log lost rows: what can be computed is shown, of prompts that lost none, and the loss is said with it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from testbed.cli import main
from testbed.config import RunConfig, load_run_file
from testbed.errors import RunLogError
from testbed.experiment import run as run_module
from testbed.experiment.results import IncompleteRunError, Results, summarise
from testbed.experiment.table import results_notes, results_table
from testbed.runlog.catalog import read_results
from testbed.runlog.columns import ROUND_COLUMNS
from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase
from testbed.runlog.table_writer import NoRoom, TableWriter

LAYERS, DEVICES, TOKENS, PROMPTS = 2, ["a", "b"], 3, 4
OF_PROMPT = len(GenerationPhase) * LAYERS  # rounds
OF_POLICY = PROMPTS * OF_PROMPT
ROWS = {c.name: 0 for c in ROUND_COLUMNS if not c.nullable and c.name not in ("device", "tokens")} | {"dilation": 1}
MANIFEST: dict[str, Any] = {
    "config": {
        "policy": [{"name": "topk"}, {"name": "wlr", "theta": 0.2}],
        "on_loss": {"invalid_above": 0.01},
        "radio": None,
    },
    "policies": ["topk", "wlr"],
    "layers": LAYERS,
    "devices": DEVICES,
    "emulated": {},
    "links": "none",
}
LEAST = """name = "small"
[[device]]
name = "a"
[[policy]]
name = "topk"
"""

Record = Callable[[Collection[int]], Path]


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    """Record a run whose rounds of these numbers find no room: two policies, four prompts each, scored and continued.

    A round takes one ms per prompt's number, counted from 1, and under the second policy half of that.
    """

    def recorded(lost: Collection[int]) -> Path:
        prepare = TableWriter.prepare

        def prepared(self: TableWriter, count: int, columns: Any) -> None:
            if columns.get("round") in lost:
                raise NoRoom("the disk is full")
            prepare(self, count, columns)

        monkeypatch.setattr(TableWriter, "prepare", prepared)
        write_manifest(tmp_path, MANIFEST)
        recorder = Recorder(tmp_path, "run", DEVICES, top_k=2, experts=0, say=lambda _: None)
        prompts = product(range(2), range(PROMPTS))
        for number, (policy, prompt) in enumerate(prompts):
            rounds = product(GenerationPhase, range(LAYERS))
            for place, (phase, layer) in enumerate(rounds, OF_PROMPT * number):
                _record(recorder, place, policy, prompt, phase, layer)
            facts = {"policy": policy, "prompt": prompt}
            recorder.event("scored", **facts, tokens=4, nats=4 * math.log(3.0 + prompt), correct=3)
            recorder.event("generated", **facts, token_s=[0.125])
        if lost:
            with pytest.raises(RunLogError, match=f"rounds lost: {len(lost)}"):
                recorder.close()
        recorder.close()
        return tmp_path

    return recorded


def _record(recorder: Recorder, number: int, policy: int, prompt: int, phase: GenerationPhase, layer: int) -> None:
    keys = {"round": number, "policy": policy, "prompt": prompt, "phase": int(phase), "layer": layer}
    count = TOKENS if phase is GenerationPhase.PREFILL else 1
    pairs: dict[str, Any] = dict.fromkeys(("expert", "asked", "device"), np.zeros((count, 2)))
    pairs |= dict.fromkeys(("weight", "kept", "final_weight"), np.ones((count, 2)))
    round_ns = (1 + prompt) * 1_000_000 // (1 + policy)
    recorder.record_round({**ROWS, **keys, "round_ns": round_ns, "bytes_down": 1000}, {**pairs, "orphaned": False})


def first_round(policy: int, prompt: int) -> int:
    return policy * OF_POLICY + prompt * OF_PROMPT


def blocks_s(results: Results) -> list[float]:
    return [row.prefill_block_sum_s for row in results.rows]


def test_a_run_that_lost_nothing_is_of_all_its_prompts(record: Record) -> None:
    results = summarise(record([]))
    assert not results.losses
    assert blocks_s(results) == pytest.approx([LAYERS * 0.010, LAYERS * 0.005])
    assert "INCOMPLETE" not in str(results_table(results).title)


def test_a_prompt_that_lost_a_round_is_left_out_and_cuts_are_of_prompts_that_both_policies_have(record: Record) -> None:
    results = summarise(record([first_round(0, 1) + 1]))  # within the first policy's second prompt
    topk, wlr = results.rows
    assert blocks_s(results) == pytest.approx([LAYERS * 0.008, LAYERS * 0.005])
    assert (topk.prefill_cut, wlr.prefill_cut) == pytest.approx((0.0, 0.5))
    assert (topk.decode_cut, wlr.decode_cut) == pytest.approx((0.0, 0.5))
    assert topk.decode_rounds_p50_s == pytest.approx(LAYERS * 0.003)
    assert topk.perplexity == pytest.approx(math.exp(np.mean(np.log([3, 5, 6]))))
    assert results.losses == (len(DEVICES) + TOKENS, 0)


def test_where_a_round_is_missing_between_two_prompts_neither_is_believed(record: Record) -> None:
    results = summarise(record([first_round(0, 1)]))  # it might have been the last one of the prompt before
    assert blocks_s(results) == pytest.approx([LAYERS * 0.007, LAYERS * 0.005])


def test_a_disk_that_stays_full_leaves_the_prompts_until_then_and_nothing_is_made_up_of_the_others(
    record: Record,
) -> None:
    results = summarise(record(range(first_round(1, 2) + 1, 2 * OF_POLICY)))
    assert blocks_s(results) == pytest.approx([LAYERS * 0.010, LAYERS * 0.0015])
    assert results.rows[1].prefill_cut == pytest.approx(0.5)


def test_a_policy_of_which_nothing_was_recorded_has_no_figures(record: Record) -> None:
    topk, wlr = summarise(record(range(first_round(1, 0), 2 * OF_POLICY))).rows
    assert topk.prefill_block_sum_s == pytest.approx(LAYERS * 0.006), "the last prompt may have lost rounds too"
    assert all(map(math.isnan, (wlr.prefill_cut, wlr.decode_cut, wlr.eq8_cut, wlr.perplexity, wlr.kept_fraction)))


def test_the_loss_is_said_in_table_notes_and_document(record: Record) -> None:
    results = summarise(record([1]))
    assert "INCOMPLETE" in str(results_table(results).title)
    (note,) = (note for note in results_notes(results) if "INCOMPLETE" in note)
    assert f"{len(DEVICES) + TOKENS} lost on a full disk" in note
    assert "every round was recorded" in note
    assert results.document()["losses"] == {"full_disk": len(DEVICES) + TOKENS, "missing": 0}


@pytest.mark.parametrize("room_for_results", [True, False])
def test_figures_of_an_incomplete_run_are_kept_and_come_with_the_error(
    record: Record, monkeypatch: pytest.MonkeyPatch, room_for_results: bool
) -> None:
    folder = record([1])

    def full(*_: object, **__: object) -> None:
        raise RunLogError("no room for results.json")

    @contextmanager
    def measured(*_: object, **__: object) -> Iterator[Path]:
        yield folder
        raise RunLogError("rounds lost: 1")

    monkeypatch.setattr(run_module, "_measured", measured)
    if not room_for_results:
        monkeypatch.setattr(run_module, "write_results", full)
    file = folder / "run.toml"
    with pytest.raises(IncompleteRunError, match="rounds lost: 1") as caught:
        run_module.run_experiment(
            load(file), config_path=file, out=None, insecure=False, display=Console(stderr=True, quiet=True)
        )
    assert caught.value.results.losses
    kept = read_results(folder)
    assert (kept is not None) == room_for_results


def test_an_error_of_the_log_before_all_was_measured_ends_the_run(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = record([])

    @contextmanager
    def never_measured(*_: object, **__: object) -> Iterator[Path]:
        raise RunLogError("no room for a log at all")
        yield folder

    monkeypatch.setattr(run_module, "_measured", never_measured)
    file = folder / "run.toml"
    with pytest.raises(RunLogError, match="no room for a log at all") as caught:
        run_module.run_experiment(
            load(file), config_path=file, out=None, insecure=False, display=Console(stderr=True, quiet=True)
        )
    assert not isinstance(caught.value, IncompleteRunError)


def test_the_command_prints_table_and_document_of_an_incomplete_run_and_fails(
    record: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record([1])
    results = summarise(folder)

    def run_experiment(*_: object, **__: object) -> None:
        raise IncompleteRunError("not complete, since the disk was full", results)

    monkeypatch.setattr(run_module, "run_experiment", run_experiment)
    file = folder / "run.toml"
    load(file)
    assert main(["run", str(file)]) == RunLogError.exit_code
    printed = capsys.readouterr()
    assert "INCOMPLETE" in printed.out
    assert "wlr" in printed.out
    assert printed.err == "error: not complete, since the disk was full\n"
    assert main(["run", str(file), "--json"]) == RunLogError.exit_code
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["losses"]["full_disk"] == len(DEVICES) + TOKENS
    assert len(document["rows"]) == 2


def load(file: Path) -> RunConfig:
    file.write_text(LEAST)
    return load_run_file(file)
