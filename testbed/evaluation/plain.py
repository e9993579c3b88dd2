"""The unmodified model on the same tasks, in this process: `python -m testbed.evaluation.plain --tasks stdlib`.

What `testbed eval` with topk and fp32 on the wire must equal, item by item. Prints one JSON document: versions, the
model's hash, and for each task the score of every item, with chance and the items' sha256 where it is an offline one.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

from bs_node.model import plain_model
from testbed.checkpoint.manifest import file_entry
from testbed.config.sections import ModelSection
from testbed.errors import WdmoeError
from testbed.evaluation.harness import Scores, score
from testbed.evaluation.make_tasks import FACTS, cached_tasks
from testbed.evaluation.tasks import Asked, load_units


class PlainModel:
    """The shipped model with its experts in it, as `harness.score` wants a live one."""

    def __init__(self) -> None:
        folder = ModelSection().folder
        self.model, self.tokenizer = plain_model(folder, "float32"), AutoTokenizer.from_pretrained(folder)
        self._prompts = 0

    def begin_prompt(self) -> int:
        self._prompts += 1
        return self._prompts - 1

    def settle(self) -> None:
        """There is nothing to settle."""


def plain_scores(tasks: Sequence[str], limit: int | None = None) -> dict[str, Scores]:
    """By task. Raises ConfigError for one that cannot be asked."""
    units, live = load_units(tasks), PlainModel()
    return {unit.name: score(live, unit, Asked(units, limit)) for unit in units}


def model_sha256() -> dict[str, str]:
    """Of the shipped model's weights, by file."""
    return {path.name: file_entry(path).sha256 for path in sorted(ModelSection().folder.glob("*.safetensors"))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="stdlib,stdlib_fresh", help="tasks by comma, as `testbed eval` takes them")
    parser.add_argument("--limit", type=int, help="at most so many items of each task")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        found = plain_scores(args.tasks.split(","), args.limit)
    except WdmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    document: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    offline = json.loads((cached_tasks() / FACTS).read_text())["tasks"]  # how many, chance, sha256
    scores = {name: {**offline.get(name, {}), "metric": it.metric, "scores": it.score_I} for name, it in found.items()}
    print(json.dumps({**document, "model": model_sha256(), "tasks": scores}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
