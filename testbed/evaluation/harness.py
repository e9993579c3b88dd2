"""lm-evaluation-harness on the model whose experts are on the nodes: every call of the model is a prompt of the log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from testbed.errors import ConfigError
from testbed.evaluation.tasks import Asked, Unit

Tell = Callable[[int, int], None]


class Live(Protocol):
    """What is needed of a live model."""

    model: Any
    tokenizer: Any

    def begin_prompt(self) -> int: ...

    def settle(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Scores:
    """A unit's items under one policy, in lm-evaluation-harness's order."""

    metric: str  # such as `acc`, or `exact_match,strict-match` with the filter of the answers: those the task has first
    score_I: list[float]
    item_I: list[str]  # task and number of each
    samples: list[dict[str, Any]]  # the item, the model's answers and the scores, as lm-evaluation-harness logs them
    first_prompt: int
    prompts: int

    def facts(self) -> dict[str, Any]:
        """What the log is told of them."""
        names = ("metric", "first_prompt", "prompts")
        return {**{name: getattr(self, name) for name in names}, "items": self.item_I, "scores": self.score_I}


class LiveLM(HFLM):  # type: ignore[misc] # lm_eval has no types
    """Prompts are begun and settled around every call. `tell(done, total)` hears of requests answered."""

    def __init__(self, live: Live, batch_size: int, tell: Tell | None = None) -> None:
        super().__init__(pretrained=live.model, tokenizer=live.tokenizer, backend="causal", batch_size=batch_size)
        self._live, self.tell = live, tell
        self.prompts: list[int] = []
        self._done, self._total = 0, 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = True, **more: Any) -> Any:
        self._total += len({tuple(context + answer[:-1]) for _, context, answer in requests})
        return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **more)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        self._total += len(requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def _model_call(self, inps: Any, *_: Any, **__: Any) -> Any:
        return self._prompt(len(inps), lambda: super(LiveLM, self)._model_call(inps))

    def _model_generate(self, context: Any, *args: Any, **settings: Any) -> Any:
        generate = super()._model_generate
        return self._prompt(len(context), lambda: generate(context, *args, **settings))

    def _prompt(self, sequences: int, call: Callable[[], Any]) -> Any:
        self.prompts.append(self._live.begin_prompt())
        answer = call()
        self._live.settle()
        self._done += sequences
        if self.tell is not None:
            self.tell(self._done, self._total)
        return answer


def score(live: Live, unit: Unit, asked: Asked, tell: Tell | None = None) -> Scores:
    """Ask the unit's items. Raises ConfigError where one cannot be asked, or the task has no score per item."""
    lm = LiveLM(live, asked.batch_size, tell)
    allowed = {"confirm_run_unsafe_code": asked.allow_code}
    try:
        found = evaluate(lm, unit.loaded, limit=asked.limit, bootstrap_iters=0, **allowed)
    except (AssertionError, ValueError) as error:
        why = " ".join(str(error).split())[:200] or "an item is empty or too long"
        raise ConfigError(f"task {unit.name}: {why}; choose another task or another model") from error
    samples = [{"task": name, **sample} for name in found["samples"] for sample in found["samples"][name]]
    metric, answers = _first_metric(unit.name, samples), samples[0]["filter"]
    first_filter = {sample["task"]: sample["filter"] for sample in reversed(samples)}
    chosen = [sample for sample in samples if sample["filter"] == first_filter[sample["task"]]]
    return Scores(
        metric if answers == "none" else f"{metric},{answers}",
        [float(sample[metric]) for sample in chosen],
        [f"{sample['task']}/{sample['doc_id']}" for sample in chosen],
        samples,
        first_prompt=lm.prompts[0],
        prompts=len(lm.prompts),
    )


def _first_metric(unit: str, samples: Sequence[dict[str, Any]]) -> str:
    """The first that is one number per item."""
    for name in samples[0]["metrics"]:
        if all(isinstance(sample.get(name), (bool, int, float)) for sample in samples):
            return str(name)
    raise ConfigError(f"task {unit}: none of its metrics is a number per item, so policies cannot be paired on it")
