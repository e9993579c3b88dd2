"""The KV cache of several prompts under way, which rows join and leave: B rows, padded on the left to S tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from testbed.errors import CheckpointError


class Batch:
    """Rows stand in the order in which they joined."""

    def __init__(self, model: Any) -> None:
        """Raises CheckpointError for a model that remembers more than keys and values per token."""
        kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            others = ", ".join(sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer}))
            raise CheckpointError(
                f"{model.config.model_type}: its cache ({others}) cannot be shared by several prompts; "
                "choose a model with plain attention"
            )
        self._model = model
        self._cache: Any = DynamicCache()  # whole, also of layers with a window: their mask forgets
        self._mask_BS = torch.zeros((0, 0), dtype=torch.long)

    def join(self, prompts: Sequence[Any], *, every_token: bool = False) -> Any:
        """Prefill prompts, token ids (T,) or embeddings (T, D), as new rows.

        Returns the logits after each, (B, 1, V); of `every_token` after each of its tokens, (B, S, V), on the left
        those of the padding. They are where the model is.
        """
        length = max(len(prompt) for prompt in prompts)
        mask_BS = torch.stack(
            [pad(torch.ones(len(prompt), dtype=torch.long), (length - len(prompt), 0)) for prompt in prompts]
        )
        cache = DynamicCache()
        inputs = self._inputs(prompts, length) | {"logits_to_keep": 0 if every_token else 1}
        logits_BSV = self._forward(cache, mask_BS, self._position_ids(mask_BS), **inputs)
        self._append(cache, mask_BS)
        return logits_BSV

    def decode(self, token_ids: Sequence[int]) -> Any:
        """The next token of every row goes in. Returns the logits after it, (B, V), where the model is."""
        self._mask_BS = pad(self._mask_BS, (0, 1), value=1)
        position_ids = self._mask_BS.sum(-1, keepdim=True) - 1
        ids_B1 = torch.tensor(token_ids, device=self._model.device)[:, None]
        return self._forward(self._cache, self._mask_BS, position_ids, input_ids=ids_B1, logits_to_keep=1)[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Let the others go, and the padding that only they needed."""
        if not rows:
            self._cache, self._mask_BS = DynamicCache(), torch.zeros((0, 0), dtype=torch.long)
            return
        if len(rows) == len(self._mask_BS):
            return
        self._mask_BS = self._mask_BS[list(rows)]
        needed = int(self._mask_BS.sum(-1).max())
        self._mask_BS = self._mask_BS[:, -needed:]
        for layer in self._cache.layers:
            layer.keys, layer.values = (kept[list(rows), :, -needed:] for kept in (layer.keys, layer.values))

    def _inputs(self, prompts: Sequence[Any], length: int) -> dict[str, Any]:
        """Ids as long as nobody brings embeddings."""
        if all(prompt.dim() == 1 for prompt in prompts):
            ids_BS = torch.stack([pad(prompt, (length - len(prompt), 0)) for prompt in prompts])
            return {"input_ids": ids_BS.to(self._model.device)}
        embed = self._model.get_input_embeddings()
        embedded = [prompt if prompt.dim() == 2 else embed(prompt.to(self._model.device)) for prompt in prompts]
        rows = [pad(row_TD.to(embed.weight), (0, 0, length - len(row_TD), 0)) for row_TD in embedded]
        return {"inputs_embeds": torch.stack(rows)}

    def _forward(self, cache: Any, mask_BS: Any, position_ids: Any, **inputs: Any) -> Any:
        device = self._model.device
        result = self._model(
            **inputs,
            attention_mask=mask_BS.to(device),
            position_ids=position_ids.to(device),
            past_key_values=cache,
            use_cache=True,
        )
        return result.logits

    @staticmethod
    def _position_ids(mask_BS: Any) -> Any:
        return (mask_BS.cumsum(-1) - 1).clamp(min=0)

    def _append(self, cache: Any, mask_BS: Any) -> None:
        if not len(self._mask_BS):
            self._cache, self._mask_BS = cache, mask_BS
            return
        length = max(self._mask_BS.shape[1], mask_BS.shape[1])
        for mine, theirs in zip(self._cache.layers, cache.layers, strict=True):
            mine.keys = _below_each_other(mine.keys, theirs.keys, length)
            mine.values = _below_each_other(mine.values, theirs.values, length)
        self._mask_BS = torch.cat([pad(mask, (length - mask.shape[1], 0)) for mask in (self._mask_BS, mask_BS)])


def _below_each_other(first_BHSD: Any, second_BHSD: Any, length: int) -> Any:
    return torch.cat([pad(rows, (0, 0, length - rows.shape[-2], 0)) for rows in (first_BHSD, second_BHSD)])
