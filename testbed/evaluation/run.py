"""Every policy of a run file asked the same items over its devices; what comes of it is read back from the log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from testbed.config import RunConfig
from testbed.evaluation.figure import write_figure
from testbed.evaluation.results import EVALUATED, EvaluationResults, summarise_evaluation
from testbed.evaluation.tasks import Asked
from testbed.experiment.run import progress_bar
from testbed.live.model import live_model
from testbed.policies.base import Policy
from testbed.runlog.catalog import write_results
from testbed.runlog.segment import new_file

SAMPLES, TABLE = "samples.jsonl", "evaluation.json"


def evaluate_policies(
    config: RunConfig,
    policies: Sequence[Policy],
    asked: Asked,
    *,
    config_path: Path,
    out: Path | None,
    insecure: bool,
    display: Console,
) -> tuple[EvaluationResults, list[Path]]:
    """Each policy in turn on the same items: the table, and the files written into the run's folder, the table as JSON,
    every item with its answers, and a figure. Raises WdmoeError for what a user can mend.
    """
    from testbed.evaluation.harness import score  # noqa: PLC0415 (torch and lm_eval)

    text = f"items of lm-evaluation-harness: {', '.join(unit.name for unit in asked.units)}"
    with (
        live_model(config, config_path=config_path, out=out, insecure=insecure, policies=policies, text=text) as live,
        progress_bar(display) as progress,
        new_file(live.run_dir / SAMPLES) as temporary,
        temporary.open("w", encoding="utf-8") as samples,
    ):
        for index, policy in enumerate(live.labels):
            live.use_policy(index)
            for unit in asked.units:
                tell = partial(progress, f"{policy}: {unit.name}")
                found = score(live, unit, asked, tell)
                for sample in found.samples:
                    samples.write(f"{json.dumps({'policy': policy, **sample}, ensure_ascii=False, default=str)}\n")
                live.event(EVALUATED, policy=index, task=unit.name, batch=asked.batch_size, **found.facts())
        run_dir = live.run_dir
    return _kept(run_dir)


def _kept(run_dir: Path) -> tuple[EvaluationResults, list[Path]]:
    results = summarise_evaluation(run_dir)
    write_results(run_dir, results.overall.document())
    without_nan = json.loads(json.dumps(results.document()), parse_constant=lambda _: None)
    with new_file(run_dir / TABLE) as temporary:
        temporary.write_text(json.dumps(without_nan, indent=1, ensure_ascii=False), encoding="utf-8")
    return results, [run_dir / TABLE, run_dir / SAMPLES, *write_figure(results, run_dir)]
