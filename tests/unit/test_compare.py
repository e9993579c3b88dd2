"""Policies and runs compared prompt by prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.cli import main
from testbed.errors import RunLogError
from testbed.runlog.compare import compare_runs, perplexity_difference
from testbed.runlog.manifest import write_manifest
from testbed.runlog.recorder import Recorder
from testbed.runlog.schema import GenerationPhase

MS, LAYERS, PROMPTS = 1_000_000, 2, 3
TOKENS = {"expert": [[0]], "weight": [[1.0]], "asked": [[0]], "kept": [[True]], "device": [[0]],
          "final_weight": [[1.0]], "orphaned": [False]}  # fmt: skip


def run_of(
    folder: Path,
    round_ms: Mapping[str, Sequence[float]],
    *,
    dilation: float = 1.0,
    nats: float = 2.0,
    factor: float = 1.0,
    stop_after: int = PROMPTS,
    decoded_tokens: int = 2,
    **facts: Any,
) -> Path:
    """Scores all prompts but the last, which is continued. round_ms: by policy, emulated, of a round of each prompt."""
    manifest = {
        "config": {"workload": {"score_prompts": 2, "generate_prompts": 1, "new_tokens": 2}}, "seed": 0,
        "layers": LAYERS, "model": {"name": "demo", "type": "mixtral", "hash": "m"}, "text_sha256": "t",
        "policies": list(round_ms), "devices": ["a"], "emulated": {}, "links": "none",
    }  # fmt: skip
    folder.mkdir()
    write_manifest(folder, manifest | facts)
    with Recorder(folder, folder.name, ["a"], top_k=1, experts=0) as recorder:
        for policy, of_prompt in enumerate(round_ms.values()):
            for prompt, ms in enumerate(of_prompt[:stop_after]):
                recorder.event("channel", policy=policy, prompt=prompt, factor=[factor], down_bits_per_s=[1e6])
                passes = [GenerationPhase.PREFILL]
                passes += [GenerationPhase.DECODE] * decoded_tokens if prompt == PROMPTS - 1 else []
                for phase in passes:
                    for layer in range(LAYERS):
                        recorder.record_round(round_of(policy, prompt, phase, layer, ms * dilation, dilation), TOKENS)
                if prompt < PROMPTS - 1:
                    recorder.event("scored", policy=policy, prompt=prompt, tokens=1, nats=nats + policy, correct=1)
                else:
                    recorder.event("generated", policy=policy, prompt=prompt, token_s=[0.1])
    return folder


def round_of(policy: int, prompt: int, phase: int, layer: int, ms: float, dilation: float) -> dict[str, Any]:
    return {
        "round": 0, "policy": policy, "prompt": prompt, "layer": layer, "phase": int(phase), "attempt": 0, "rows": 1,
        "experts_touched": 1, "bytes_down": 1, "bytes_up": 1, "parts_down": 1, "parts_up": 1, "status": 1,
        "state_available": True, "dilation": dilation, "round_ns": int(ms * MS),
    }  # fmt: skip


TWO = {"topk": [8.0, 10.0, 12.0], "wlr": [4.0, 5.0, 6.0]}


def test_policies_of_one_run_are_compared_with_its_first(tmp_path: Path) -> None:
    topk, wlr = compare_runs([run_of(tmp_path / "a", TWO)], [])
    assert (topk.prefill.cut, wlr.prefill.cut) == pytest.approx((0.0, 0.5))
    assert (wlr.prefill.low, wlr.prefill.high) == pytest.approx((0.5, 0.5))
    assert wlr.decode.cut == pytest.approx(0.5)
    assert math.isnan(wlr.decode.low)  # one prompt was continued
    assert (wlr.prompts, wlr.policy, wlr.index) == (PROMPTS, "wlr", 1)


def test_perplexity_is_compared_over_the_same_prompts(tmp_path: Path) -> None:
    _, wlr = compare_runs([run_of(tmp_path / "a", TWO)], [])
    assert wlr.perplexity == pytest.approx(math.exp(3))
    assert wlr.perplexity_more == pytest.approx((math.exp(3) - math.exp(2),) * 3)


def test_runs_are_compared_in_emulated_time_with_the_first_policy_of_the_first(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a", TWO), run_of(tmp_path / "b", {"topk": [2.0, 2.5, 3.0]}, dilation=10.0)]
    assert [one.prefill.cut for one in compare_runs(runs, [])] == pytest.approx([0, 0.5, 0.75])
    assert [one.run for one in compare_runs(runs, [0])] == ["a", "b"]


def test_a_decoded_token_is_compared_with_a_decoded_token_however_many_there_are(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / "a", TWO), run_of(tmp_path / "b", TWO, decoded_tokens=4)]
    assert compare_runs(runs, [0])[1].decode.cut == pytest.approx(0.0)


def test_a_prompt_that_lost_a_round_is_compared_with_nothing(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "a", TWO | {"wlr": [4.0, 1.0, 6.0]})
    path = folder / "rounds-0000.parquet"
    rows = pq.read_table(path)
    gone = [(row["policy"], row["prompt"]) for row in rows.to_pylist()].index((0, 1))
    pq.write_table(pa.concat_tables([rows.slice(0, gone), rows.slice(gone + 1)]), path)
    _, wlr = compare_runs([folder], [])
    assert wlr.prefill.cut == pytest.approx(0.5), "of the first and the last prompt"


def test_an_aborted_run_is_compared_over_the_prompts_it_finished_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run_of(tmp_path / "a", TWO), run_of(tmp_path / "b", TWO, stop_after=1)]
    assert [one.prompts for one in compare_runs(runs, [0])] == [PROMPTS, 1]
    assert main(["logs", "compare", *map(str, runs), "--policy", "0"]) == 0
    assert "ABORTED: b ended before its last prompt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"text_sha256": "u"}, "another text"),
        ({"seed": 1}, "another seed"),
        ({"model": {"name": "demo", "type": "mixtral", "hash": "n"}}, "another model"),
        ({"layers": 4}, "another model"),
        ({"config": {"workload": {"score_prompts": 3, "generate_prompts": 0, "new_tokens": 0}}}, "another length"),
        ({"factor": 2.0}, "prompt 0 met another channel"),
        ({"stop_after": 0}, "no prompt in common"),
    ],
)
def test_runs_that_do_not_pair_up_are_refused_with_one_line(
    tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RunLogError, match=reason) as caught:
        compare_runs([run_of(tmp_path / "a", TWO), run_of(tmp_path / "b", TWO, **changed)], [])
    assert "\n" not in str(caught.value)


def test_one_policy_alone_and_an_unknown_one_are_refused(tmp_path: Path) -> None:
    run_dir = run_of(tmp_path / "a", TWO)
    with pytest.raises(RunLogError, match="one policy alone; name a second run"):
        compare_runs([run_dir], [1])
    with pytest.raises(RunLogError, match="--policy 7: a has 0 topk, 1 wlr"):
        compare_runs([run_dir], [0, 7])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(1, 400), st.integers(1, 200)), min_size=2, max_size=8), st.floats(0, 2))
def test_the_interval_of_the_perplexity_holds_the_difference_and_is_none_against_itself(
    scored: list[tuple[float, int]], more_nats: float
) -> None:
    reference_P2 = np.array([[tokens * (1 + nats / 400), tokens] for nats, tokens in scored])
    scored_P2 = reference_P2 + np.array([more_nats, 0])
    assert perplexity_difference(reference_P2, reference_P2) == (0, 0, 0)
    difference = perplexity_difference(scored_P2, reference_P2)
    assert difference == perplexity_difference(scored_P2, reference_P2)
    assert difference.low <= difference.high
    assert difference.value >= 0


def test_the_last_line_for_machines_is_one_document_with_null_for_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(tmp_path / "20260101-000000-a", TWO)
    assert main(["logs", "compare", "--logs", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["reference"] == {"run": "20260101-000000-a", "policy": "topk"}
    assert document["rows"][1]["prefill"]["cut"] == pytest.approx(0.5)
    assert document["rows"][1]["decode"]["low"] is None
    assert document["rows"][1]["valid"] is None


def test_people_get_cuts_with_their_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = run_of(tmp_path / "a", TWO)
    assert main(["logs", "compare", str(run_dir)]) == 0
    shown = capsys.readouterr().out
    assert "50.0 to 50.0" in shown
    assert "+12.696" in shown
