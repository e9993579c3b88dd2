"""Where a checkpoint comes from: a folder, or the hub by name, at one commit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from testbed.errors import CheckpointError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


class Fetched(NamedTuple):
    folder: Path
    name: str  # OWNER/NAME, or that of the folder
    commit: str | None  # on the hub; None for a folder


def fetch(
    model: str, *, revision: str | None = None, trusted: str | None = None, headers_only: bool = False
) -> Fetched:
    """A checkpoint, downloaded where `model` is a name on the hub, going on with what was begun.

    revision: commit, tag or branch on the hub. trusted: the name of a model whose own code may run.
    headers_only: of weights on the hub that are not here yet, files that hold nothing but their headers will do.
    Raises CheckpointError where there is no such folder or model, or the hub is out of reach.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{model}: a folder has no --revision; leave it out")
        return Fetched(folder, folder.resolve().name or "model", None)
    if not HUB_NAME.fullmatch(model):
        raise CheckpointError(f"{model}: no such folder, and no name of a model on the hub (OWNER/NAME)")
    from testbed.checkpoint.hub import download  # noqa: PLC0415 - a folder needs none of it

    return Fetched(*download(model, revision, trusted, headers_only=headers_only))
