"""Write the offline tasks for lm-evaluation-harness: `python -m testbed.evaluation.make_tasks --out DIR`.

A JSONL file and a YAML file per task, and items.json: how many items, what chance would get, and the sha256 of each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testbed.demo.corpus import documents
from testbed.errors import ConfigError, WdmoeError
from testbed.evaluation.items import Task, make_items
from testbed.paths import cache_directory

FACTS = "items.json"
GENERATED_TOKENS = 6


def write_tasks(tasks: Sequence[Task], out: Path) -> dict[str, Any]:
    """Write the tasks into a folder that is not there yet, whole or not at all; returns what items.json says.

    Raises ConfigError where there is something already.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; name a new folder")
    facts = _facts(tasks)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            for task in tasks:
                name = task.kind.name
                (temporary / f"{name}.jsonl").write_text(task.jsonl(), encoding="utf-8")
                settings = _settings(task, out.resolve() / f"{name}.jsonl")
                # JSON is YAML
                (temporary / f"{name}.yaml").write_text(json.dumps(settings, indent=2), encoding="utf-8")
            (temporary / FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")
            temporary.chmod(0o755)
            temporary.rename(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written ({error.strerror}); name another folder") from error
    return facts


def cached_tasks() -> Path:
    """The folder of this Python's tasks, made once and kept in the cache."""
    tasks = make_items(documents(held_out=True), documents(held_out=False))
    digest = hashlib.sha256(json.dumps([_facts(tasks), GENERATED_TOKENS]).encode()).hexdigest()[:16]
    out = cache_directory() / "tasks" / digest
    if not (out / FACTS).is_file():
        write_tasks(tasks, out)
    return out


def _facts(tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "tasks": {
            task.kind.name: {
                "items": len(task.items),
                "files": len({item.path for item in task.items}),
                "chance": task.chance,
                "sha256": hashlib.sha256(task.jsonl().encode()).hexdigest(),
            }
            for task in tasks
        },
    }


def _settings(task: Task, items: Path) -> dict[str, Any]:
    """The task as lm-evaluation-harness wants it."""
    kind = task.kind
    shared = {
        "task": kind.name,
        "tag": list(kind.tags),
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "doc_to_text": "context",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metadata": {"version": 1.0},
    }
    if not kind.answer:
        asked = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
        return {**shared, **asked, "metric_list": [_mean("acc")]}
    return {
        **shared,
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": GENERATED_TOKENS, "do_sample": False},
        "filter_list": [
            {
                "name": "answer",
                "filter": [{"function": "regex", "regex_pattern": kind.answer}, {"function": "take_first"}],
            }
        ],
        "metric_list": [_mean("exact_match")],
    }


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder that is not there yet")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(write_tasks(make_items(documents(held_out=True), documents(held_out=False)), args.out)))
    except WdmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
