"""Checkpoints on the Hugging Face hub: one commit of them, whole, or their headers alone."""

from __future__ import annotations

import errno
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from testbed.checkpoint.hub_weights import fetch_weights
from testbed.checkpoint.own_code import CODE, allow_own_code
from testbed.checkpoint.tensor_files import weight_file_names
from testbed.errors import CheckpointError
from testbed.paths import cache_directory

SMALL = ("*.json", "tokenizer*", "*.model", "vocab*", "merges.txt", "*.jinja")
LOG_IN = "log in (`hf auth login`, or HF_TOKEN)"


def download(name: str, revision: str | None, trusted: str | None, *, headers_only: bool) -> tuple[Path, str, str]:
    """(folder, name, commit) of a model on the hub. Weights come last: what is refused costs no download of them.

    Both downloads are of one commit, whatever the branch does meanwhile. Raises CheckpointError.
    """
    if not sys.stderr.isatty():
        disable_progress_bars()
    patterns = [*SMALL, CODE] if trusted == name else [*SMALL]
    with _in_one_line(name, revision):
        small = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        commit = small.name
        allow_own_code(small, name, trusted)
        weights = weight_file_names(small)
        patterns += weights
        if not _is_here(name, commit, patterns):
            if headers_only:
                return _headers(name, small), name, commit
            fetch_weights(name, commit, small.parents[1] / "blobs", weights)
        return Path(snapshot_download(name, revision=commit, allow_patterns=patterns)), name, commit


def _is_here(name: str, commit: str, patterns: list[str]) -> bool:
    try:
        snapshot_download(name, revision=commit, allow_patterns=patterns, local_files_only=True)
    except LocalEntryNotFoundError:
        return False
    return True


def _headers(name: str, small: Path) -> Path:
    """A folder like the checkpoint's, its weights full of holes: they have their length, and read as zeros."""
    folder = cache_directory() / "headers" / name.replace("/", "--") / small.name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        growing = Path(made) / small.name
        growing.mkdir()
        for path in small.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, growing / path.name)
        for weights in weight_file_names(small):
            _write_header(name, small.name, weights, growing)
        if not folder.is_dir():
            growing.rename(folder)
    return folder


def _write_header(name: str, commit: str, weights: str, folder: Path) -> None:
    try:
        found = HfApi().parse_safetensors_file_metadata(name, weights, revision=commit)
    except RemoteEntryNotFoundError:
        return  # the model is refused for it when it is looked at
    except SafetensorsParsingError as error:
        raise CheckpointError(f"{name}: {weights} is no safetensors file; tell whoever keeps it on the hub") from error
    tensors = {
        key: {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": tensor.data_offsets}
        for key, tensor in found.tensors.items()
    }
    header: dict[str, Any] = {"__metadata__": found.metadata, **tensors} if found.metadata else tensors
    text = json.dumps(header).encode()
    with (folder / weights).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + max((tensor.data_offsets[1] for tensor in found.tensors.values()), default=0))


@contextmanager
def _in_one_line(name: str, revision: str | None) -> Iterator[None]:
    lost: Any = (*HfHubHTTPError.__bases__, ValueError)  # OSError, and the error of its HTTP client, whichever that is
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Not enough free disk space")  # we say so if it comes to that
            yield
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{name}: no revision {revision} on the hub; see its list of commits") from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: is gated: accept its terms at {constants.ENDPOINT}/{name}, then {LOG_IN}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{name}: the hub is out of reach{_status(error.__cause__)}, and its cache here does not have all of it; "
            "go online, or name a folder"
        ) from error
    except HfHubHTTPError as error:
        unknown = isinstance(error, RepositoryNotFoundError) or error.response.status_code == HTTPStatus.UNAUTHORIZED
        reason = "no such model on the hub, or a private one" if unknown else f"the hub refused it{_status(error)}"
        raise CheckpointError(f"{name}: {reason}; check the name, or {LOG_IN}") from error
    except lost as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{name}: no space left in {constants.HF_HUB_CACHE}; free some, or set HF_HOME to a folder on another "
                "disk, and start it again: it goes on"
            ) from error
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{name}: download failed ({reason:.120}); start it again, it goes on") from error


def _status(error: BaseException | None) -> str:
    response = getattr(error, "response", None)
    return "" if response is None else f" (HTTP {response.status_code})"
