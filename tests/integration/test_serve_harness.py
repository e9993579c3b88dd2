"""lm-evaluation-harness drives the server over HTTP, and finds what the plain model says in process."""
# ruff: noqa: E402 - what is imported below needs what importorskip has just found

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

for name in ("torch", "transformers", "starlette", "uvicorn", "aiohttp", "tenacity"):
    pytest.importorskip(name)
completions = pytest.importorskip("lm_eval.models.openai_completions")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from processes import EXACT, TESTBED, run_file, started
from transformers import AutoTokenizer

from bs_node.model import plain_model
from testbed.config.sections import ModelSection

pytestmark = [pytest.mark.torch]

DEMO = ModelSection().folder
CONTEXTS = ["def main(", "import os\nimport ", "for i in range(10", "class PathTests(unittest.TestCase):\n    def "]
CHOICES = ["self):", "sys\n", "):\n        return"]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=index) for index, each in enumerate(arguments)]


def test_the_same_log_likelihoods_and_texts_as_the_plain_model_in_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    plain = HFLM(pretrained=plain_model(DEMO, "float32"), tokenizer=tokenizer, backend="causal", batch_size=1)
    scored = requests("loglikelihood", [(context, choice) for context in CONTEXTS for choice in CHOICES])
    until = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    continued = requests("generate_until", [(context, until) for context in CONTEXTS])
    file = run_file(tmp_path, EXACT, devices=[""] * 2)
    with started([TESTBED, "serve", str(file), "--port", "0", "--json"], tmp_path) as command:
        assert command.process.stdout is not None
        address = json.loads(command.process.stdout.readline())["address"]
        served = completions.LocalCompletionsAPI(
            base_url=f"{address}/completions", model="demo", tokenizer=str(DEMO), tokenizer_backend="huggingface",
            batch_size=3, max_length=1024,
        )  # fmt: skip
        found, texts = served.loglikelihood(scored), served.generate_until(continued)
    expected = plain.loglikelihood(scored, disable_tqdm=True)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]
    assert len({greedy for _, greedy in found}) == 2
    assert texts == plain.generate_until(continued, disable_tqdm=True)
