"""The split checkpoint of a run: made once and kept in the cache, or the folder that `testbed split` has written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from testbed.checkpoint.manifest import MANIFEST_NAME, Manifest, load_manifest
from testbed.config import RunConfig
from testbed.errors import ConfigError
from testbed.paths import cache_directory

FORMAT = 2  # of a split in the cache: one of another number is made anew


def split_model(config: RunConfig) -> tuple[Path, Manifest]:
    """The run's split checkpoint and its manifest.

    Raises CheckpointError for a model that cannot be split, ConfigError where a folder that is split already was made
    for other devices or another placement than the run file's.
    """
    from testbed.checkpoint.split import split  # torch: a run file is checked without it

    source = config.model.folder.resolve()
    if (source / MANIFEST_NAME).is_file():
        return source, _split_already(source, config)
    devices = [device.name for device in config.devices]
    wanted = json.dumps([FORMAT, str(source), fingerprint(source), devices, config.placement], sort_keys=True)
    out_dir = cache_directory() / "splits" / hashlib.sha256(wanted.encode()).hexdigest()[:16]
    trusted = config.model.trust_remote_code
    return out_dir, split(source, out_dir, devices, placement=config.placement, trusted=trusted)


def _split_already(folder: Path, config: RunConfig) -> Manifest:
    manifest, devices = load_manifest(folder), tuple(device.name for device in config.devices)
    if manifest.devices != devices:
        raise ConfigError(
            f"{folder}: was split for {', '.join(manifest.devices)}, the run file names {', '.join(devices)}; "
            "name the same devices in the same order, or split the model for these"
        )
    if config.placement is not None:
        raise ConfigError(f"{folder}: says itself which device holds what; take [placement] out of the run file")
    return manifest


def fingerprint(folder: Path) -> list[list[Any]]:
    """Changes when a file of the checkpoint does."""
    if not folder.is_dir():
        return []
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir()) if p.is_file()]
