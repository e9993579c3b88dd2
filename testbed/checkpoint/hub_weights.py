"""Large files from the hub into its cache, going on where a download ended.

huggingface_hub begins a file anew in every process, and does not look whether what came is what was asked for.
"""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from testbed.checkpoint.manifest import file_entry
from testbed.errors import CheckpointError

SHA256_DIGITS = 64


def fetch_weights(name: str, commit: str, blobs: Path, file_names: Sequence[str]) -> None:
    """Brings files of a model into `blobs`, the cache's folder of them, where `snapshot_download` finds them.

    A name that the model does not have is passed over. Raises CheckpointError for a file whose sha256 is not the hub's,
    and what huggingface_hub raises.
    """
    blobs.mkdir(parents=True, exist_ok=True)
    for file_name in file_names:
        _fetch(name, hf_hub_url(name, file_name, revision=commit), file_name, blobs)


def _fetch(name: str, url: str, file_name: str, blobs: Path) -> None:
    try:
        found = get_hf_file_metadata(url)
    except RemoteEntryNotFoundError:
        return
    if found.etag is None or found.size is None or found.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # left to huggingface_hub, which has another way for such files
    if (blobs / found.etag).exists():
        return
    growing = blobs / f"{found.etag}.begun"
    with growing.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if (blobs / found.etag).exists():  # another process was quicker
            return
        begun = growing.stat().st_size
        if begun < found.size:
            http_get(
                url,
                file,
                resume_size=begun,
                headers=build_hf_headers(),
                expected_size=found.size,
                displayed_filename=file_name,
            )
        file.flush()
        if len(found.etag) == SHA256_DIGITS and file_entry(growing).sha256 != found.etag:
            growing.unlink()
            raise CheckpointError(f"{name}: {file_name} came damaged (its sha256 is not the hub's); start it again")
        growing.rename(blobs / found.etag)
