"""What the gate thought of every expert, also of those that it did not choose.

`fn(module, hidden, index, weights)` of the experts interface shows the chosen ones only. The gate's own first output,
caught by a hook, is the router logits of all. One rule fits all families but Phi-MoE (two separate softmaxes): the
chosen weights are the softmax or the sigmoid of the logits, times a constant per token. Each gate is checked against it
on its first forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from testbed.checkpoint.families import gate_of

Array = NDArray[np.float32]
Score = Callable[[Array], Array]
FINE_TOLERANCE, COARSE_TOLERANCE = 1e-4, 2e-2  # relative: everything in fp32; something rounded to bf16 or fp16


def _already_softmax(logits_TE: Array) -> Array:
    """Of a gate whose first output is no logits (Gemma 4); NaN for all others, which fits nothing."""
    is_softmax = (logits_TE >= 0).all() and (np.abs(logits_TE.sum(-1) - 1) < COARSE_TOLERANCE).all()
    return logits_TE if is_softmax else np.full_like(logits_TE, np.nan)


def _softmax(logits_TE: Array) -> Array:
    power_TE: Array = np.exp(logits_TE - logits_TE.max(-1, keepdims=True))
    power_TE /= power_TE.sum(-1, keepdims=True)
    return power_TE


def _sigmoid(logits_TE: Array) -> Array:
    power_TE: Array = np.exp(-np.maximum(logits_TE, -80))  # below, exp would overflow and the score is 0 anyway
    return np.reciprocal(1 + power_TE)


RULES: tuple[Score, ...] = (_already_softmax, _softmax, _sigmoid)


class Gate:
    """Catches what one gate gives, and turns it into the weight every expert would have had."""

    def __init__(self, gate: torch.nn.Module) -> None:
        scale = getattr(gate, "per_expert_scale", None)
        self._scale_E = None if scale is None else _array(scale)
        self._logits: torch.Tensor | None = None
        self._rounded = False
        self._rule: Score | None = None
        self._checked = False
        gate.register_forward_hook(self._catch)

    @classmethod
    def beside(cls, model: torch.nn.Module, path: str) -> Gate | None:
        """Hooks the gate of the experts module at `path`; None where the model keeps none beside it."""
        gate = gate_of(model, path)
        return None if gate is None else cls(gate)

    def _catch(self, _gate: Any, _args: Any, output: Any) -> None:
        self._logits = None
        if isinstance(output, tuple) and isinstance(output[0], torch.Tensor):
            # from a GPU it is there once the stream was waited for, as every round does before it looks
            self._logits = output[0].detach().flatten(0, -2).to("cpu", torch.float32, non_blocking=True)
            self._rounded = any(o.dtype in (torch.bfloat16, torch.float16) for o in output if hasattr(o, "dtype"))

    def scores(self, expert_TK: NDArray[np.integer[Any]], weight_TK: Array) -> Array | None:
        """score_TE: the weight of every expert for each token of the forward under way; weight_TK where chosen.

        None where the rule does not reproduce this gate. To be asked once per forward, from the experts function.
        """
        logits, self._logits = self._logits, None
        if logits is None or len(logits) != len(expert_TK):
            return None
        logits_TE: Array = logits.numpy()
        if not self._checked:
            self._rule, self._checked = self._fitting_rule(logits_TE, expert_TK, weight_TK), True
        if self._rule is None:
            return None
        score_TE = self._score(self._rule, logits_TE)
        constant_T1: Array = weight_TK.sum(-1, keepdims=True) / _chosen(score_TE, expert_TK).sum(-1, keepdims=True)
        return constant_T1 * score_TE

    def _score(self, rule: Score, logits_TE: Array) -> Array:
        score_TE = rule(logits_TE)
        return score_TE if self._scale_E is None else score_TE * self._scale_E

    def _fitting_rule(self, logits_TE: Array, expert_TK: NDArray[np.integer[Any]], weight_TK: Array) -> Score | None:
        tolerance = COARSE_TOLERANCE if self._rounded else FINE_TOLERANCE
        for rule in RULES:
            chosen_TK = _chosen(self._score(rule, logits_TE), expert_TK)
            constant_TK = np.divide(weight_TK, chosen_TK, out=np.full_like(chosen_TK, np.nan), where=chosen_TK > 0)
            # one expert per token fits any rule: then the constant must be one for all tokens
            if _rows_agree(constant_TK if expert_TK.shape[1] > 1 else constant_TK.T, tolerance):
                return rule
        return None


def _array(tensor: torch.Tensor) -> Array:
    array: Array = tensor.detach().to("cpu", torch.float32).numpy()
    return array


def _chosen(score_TE: Array, expert_TK: NDArray[np.integer[Any]]) -> Array:
    """Scores of the chosen experts; 0 where an id stands for no expert."""
    experts = score_TE.shape[1]
    chosen_TK: Array = np.take_along_axis(score_TE, np.minimum(expert_TK, experts - 1), 1) * (expert_TK < experts)
    return chosen_TK


def _rows_agree(values: Array, tolerance: float) -> bool:
    """Whether the known values of each row lie within a part of one another, and any is known at all."""
    known = ~np.isnan(values)
    low = np.where(known, values, np.inf).min(-1)
    high = np.where(known, values, -np.inf).max(-1)
    return bool(known.any() and (high - low <= tolerance * np.abs(high))[known.any(-1)].all())
