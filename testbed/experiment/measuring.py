"""What a policy is measured on: every window of the workload scored or continued, and what came of it in the log."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from testbed.experiment.base_station import BaseStation
from testbed.experiment.workload import Window, Workload
from testbed.policies.steering import Steered

Progress = Callable[[str, int, int], None]


@torch.inference_mode()
def run_policy(
    base_station: BaseStation, workload: Workload, new_tokens: int, index: int, label: str, progress: Progress
) -> None:
    """Score and continue every window of the workload under one policy; `progress(label, done, total)` hears of it."""
    session, total = base_station.session, len(workload.scored) + len(workload.continued)
    base_station.use_policy(index)
    try:
        for prompt, window in enumerate((*workload.scored, *workload.continued)):
            progress(label, prompt, total)
            continued = prompt >= len(workload.scored)
            base_station.begin(index, prompt)
            done = _continue(base_station, window, new_tokens) if continued else _score(base_station, window)
            facts = {"policy": index, "prompt": prompt, "path": window.path}
            base_station.recorder.event("generated" if continued else "scored", **facts, **done)
            _note_strength(base_station, index, prompt)
    finally:
        session.settle()  # also the round that ended the run
    progress(label, total, total)


def _note_strength(base_station: BaseStation, index: int, prompt: int) -> None:
    """Log where steering has come to."""
    policy, phase = base_station.session.policy, int(base_station.session.phase)
    if isinstance(policy, Steered):
        facts = {"strength": policy.strength, "saturated_rounds": policy.saturated_rounds}
        base_station.recorder.event("steered", policy=index, prompt=prompt, phase=phase, **facts)


def _token_ids(base_station: BaseStation, window: Window) -> torch.Tensor:
    """(1, T), where the model is."""
    return torch.tensor([window.token_ids], device=base_station.model.device)


def _score(base_station: BaseStation, window: Window) -> dict[str, Any]:
    """How well the model predicts each next token of the window."""
    token_ids = _token_ids(base_station, window)
    logits_TV = base_station.model(input_ids=token_ids[:, :-1], use_cache=False).logits[0].float()
    base_station.session.settle()
    target_T = token_ids[0, 1:]
    return {
        "tokens": len(target_T),
        "nats": torch.nn.functional.cross_entropy(logits_TV, target_T, reduction="sum").item(),
        "correct": int((logits_TV.argmax(-1) == target_T).sum()),
    }


def _continue(base_station: BaseStation, window: Window, new_tokens: int) -> dict[str, Any]:
    """A greedy continuation with the KV cache, and when each of its tokens was there."""
    token_ids = _token_ids(base_station, window)
    stamps = TokenStamps()
    generated = base_station.model.generate(
        token_ids,
        attention_mask=torch.ones_like(token_ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=stamps,
    )
    base_station.session.settle()
    text = base_station.tokenizer.decode(generated[0, token_ids.shape[1] :])
    return {"token_s": stamps.token_s(), "text": text}


class TokenStamps(BaseStreamer):
    """Hears of the prompt first, then of every generated token."""

    def __init__(self) -> None:
        self._stamps_ns: list[int] = []

    def put(self, _value: Any) -> None:
        self._stamps_ns.append(time.monotonic_ns())

    def end(self) -> None:
        """Nothing is held back."""

    def token_s(self) -> list[float]:
        """Seconds that each decoded token took: the first one came out of the prefill."""
        tokens = self._stamps_ns[1:]
        return [(later - earlier) / 1e9 for earlier, later in pairwise(tokens)]
