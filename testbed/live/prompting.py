"""From a user's words to what the model is given: token ids, or embeddings where the ids stay with the user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from testbed.errors import CheckpointError, ConfigError
from testbed.live.model import LiveModel

MAX_PROMPT_CHARACTERS = 2**20
Turn = dict[str, str]  # role and content


def token_ids_of(tokenizer: Any, text: str) -> Any:
    """(T,), with the special tokens that the model expects around a text. Raises ConfigError for one too long or no
    text at all.
    """
    _check_text(text)
    ids = tokenizer(text)["input_ids"]
    if not ids and tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id]
    return torch.tensor(ids, dtype=torch.long)


def chat_token_ids(tokenizer: Any, turns: Sequence[Turn]) -> Any:
    """(T,) of a conversation that the model is to go on with. Raises ConfigError where its template refuses it."""
    if tokenizer.chat_template is None:
        return token_ids_of(tokenizer, plain_turns(turns))
    _check_text(plain_turns(turns))
    from jinja2 import TemplateError  # noqa: PLC0415 - only what has a template needs it

    try:
        ids = tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=True)["input_ids"]
    except TemplateError as error:
        raise ConfigError(f"the model's chat template refuses this conversation: {error}") from error
    return torch.tensor(ids, dtype=torch.long)


def _check_text(text: str) -> None:
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise ConfigError(f"the prompt has {len(text)} characters; at most {MAX_PROMPT_CHARACTERS} are taken")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line
        raise ConfigError(f"the prompt is not UTF-8 text (character {error.start})") from error


def plain_turns(turns: Sequence[Turn]) -> str:
    """For a model without a chat template: what was said, one after the other; the model goes on with the text."""
    return "\n".join(turn["content"] for turn in turns)


class UserSide:
    """The embedding table on the user's side: what leaves it are embeddings.

    No privacy: whoever has the model finds each id again as the nearest row of the same table.
    """

    def __init__(self, live: LiveModel) -> None:
        """Raises CheckpointError for a model whose embedding is more than a table."""
        table = live.model.get_input_embeddings()
        if type(table) is not torch.nn.Embedding:
            raise CheckpointError(
                f"--embed-locally: {type(table).__name__} of this model is more than a table; leave it out"
            )
        self._table = table

    @torch.inference_mode()
    def embed(self, token_ids_T: Any) -> Any:
        """(T, D)."""
        return self._table(token_ids_T.to(self._table.weight.device))
