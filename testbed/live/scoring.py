"""How likely tokens were: by the model's own logits, before temperature, top_k and top_p."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

MIN_LOGPROB = -9999.0  # of a token that the model rules out; OpenAI says it so
TOKENS_AT_ONCE = 64  # whose probabilities, one for each word of the vocabulary, are in memory together


class TokenScore(NamedTuple):
    token_id: int
    logprob: float  # natural logarithm of its probability
    top: tuple[tuple[int, float], ...]  # token id and logprob, the likeliest first


def token_scores(logits_TV: Any, token_ids: Sequence[int], top: int) -> list[TokenScore]:
    """Of tokens whose logits these are: logits_TV[t] came before token_ids[t]."""
    scores: list[TokenScore] = []
    for begin in range(0, len(token_ids), TOKENS_AT_ONCE):
        ids = token_ids[begin : begin + TOKENS_AT_ONCE]
        logprobs_TV = logits_TV[begin : begin + len(ids)].float().log_softmax(-1).clamp(min=MIN_LOGPROB)
        own_T1 = logprobs_TV.gather(-1, torch.tensor(ids, device=logprobs_TV.device)[:, None])
        likeliest = logprobs_TV.topk(min(top, logprobs_TV.shape[-1]))
        found = zip(ids, own_T1[:, 0].tolist(), likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        scores += [TokenScore(id_, own, tuple(zip(best, values, strict=True))) for id_, own, best, values in found]
    return scores
