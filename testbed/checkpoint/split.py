"""Splits a Hugging Face MoE checkpoint into what the base station loads and one shard of experts per device."""

from __future__ import annotations

import errno
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch

from testbed.checkpoint.families import DTYPES, canonical
from testbed.checkpoint.ffn import tensor_name
from testbed.checkpoint.job import Source, SplitJob, Step
from testbed.checkpoint.manifest import (
    BS_NAME,
    MANIFEST_NAME,
    Dtype,
    FileEntry,
    Layer,
    Manifest,
    file_entry,
    load_manifest,
    shard_name,
    verify_file,
)
from testbed.checkpoint.partial import Journal, Keeper, Partial
from testbed.checkpoint.placement import Held
from testbed.checkpoint.shard_writer import Hashing, ShardWriter, raw_bytes
from testbed.checkpoint.stored_formats import WeightFormat
from testbed.checkpoint.weight_formats import encode_expert
from testbed.errors import CheckpointError

Progress = Callable[[int, int], None]
Pieces = dict[str, list[torch.Tensor]]  # part of an expert -> its rows, in pieces
SPARE_BYTES = 1 << 20  # headers, manifest, journal


def split(
    model_dir: Path,
    out_dir: Path,
    devices: Sequence[str],
    *,
    placement: Mapping[str, Held] | None = None,
    dtype: Dtype | None = None,
    weight_formats: Mapping[str, WeightFormat] | None = None,
    trusted: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Splits the checkpoint in `model_dir` into `out_dir` and returns the manifest. See `run_split`."""
    job = SplitJob.of(Source.of(Path(model_dir), trusted=trusted), devices, placement, dtype, weight_formats)
    return run_split(job, Path(out_dir), progress)


def run_split(job: SplitJob, out_dir: Path, progress: Progress | None = None) -> Manifest:
    """Writes what the job says into `out_dir` and returns the manifest.

    progress: called with (bytes written, bytes in all). `out_dir` appears complete, also after a power cut, or not at
    all; what an interrupted split had written is gone on with. An `out_dir` that exists is returned, once every byte
    of model and split is checked, if it is this very split. Raises CheckpointError if it is another one, for a
    checkpoint that turns out to be damaged, and where the disk is full.
    """
    if _is_taken(out_dir):
        return _existing(out_dir, job)
    try:
        with Partial(out_dir) as partial:
            if _is_taken(out_dir):  # another process was quicker
                partial.remove()
                return _existing(out_dir, job)
            manifest = _write(job, partial, progress)
            partial.become(out_dir)
            return manifest
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space and start it again: it goes on where it was" if full else "nothing was written there"
        raise CheckpointError(f"{out_dir}: {error.strerror or error}; {hint}") from error


def _is_taken(out_dir: Path) -> bool:
    if out_dir.exists() and not out_dir.is_dir():
        raise CheckpointError(f"{out_dir}: is a file; name a folder that is not there yet")
    return out_dir.exists() and any(out_dir.iterdir())


def _existing(out_dir: Path, job: SplitJob) -> Manifest:
    manifest = load_manifest(out_dir)
    theirs = (manifest.source_hash, manifest.devices, manifest.placement, manifest.dtype, manifest.weight_format)
    if theirs != (job.source_hash, job.devices, job.placement, job.dtype, job.weight_formats) or (
        manifest.model_hash != job.model_hash(_checksums(job))
    ):
        raise CheckpointError(f"{out_dir}: holds another model or placement; name another folder, or remove this one")
    for name in manifest.files:
        verify_file(out_dir, name, manifest)
    return manifest


def _checksums(job: SplitJob) -> dict[str, int]:
    """Reads the whole model and writes nothing."""
    checksums: dict[str, int] = {}
    for step in job.steps():
        for name, pieces in _read(job, step)[1].items():
            checksums[name] = _crc32(pieces)
    return checksums


def _write(job: SplitJob, partial: Partial, progress: Progress | None) -> Manifest:
    identity = job.identity()
    journal = partial.journal(identity)
    _refuse_if_too_large(job, partial.path)
    with Hashing() as hashing, ThreadPoolExecutor(1) as checking, ExitStack() as closing:
        writers, begun = _open(job, partial, journal, hashing)
        for writer in writers.values():
            closing.callback(writer.close)
        checksums = dict(begun.checksums) if begun else {}
        with Keeper(partial, identity, writers) as keeper:
            for number, step in enumerate(job.steps(), start=1):
                if begun and number <= begun.steps:
                    continue
                checksums |= _write_step(job, step, writers, checking)
                if progress:
                    progress(sum(writer.bytes for writer in writers.values()), job.total_bytes)
                keeper.keep_now_and_then(number, checksums)
            keeper.wait()
        files = {name: writer.finish() for name, writer in writers.items()}
    for path in job.source.copied():
        shutil.copyfile(path, partial.path / path.name)
        files[path.name] = file_entry(partial.path / path.name)
    manifest = _manifest(job, checksums, files)
    (partial.path / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n")
    return manifest


def _manifest(job: SplitJob, checksums: Mapping[str, int], files: Mapping[str, FileEntry]) -> Manifest:
    return Manifest(
        model_name=job.source.name,
        hub_commit=job.source.commit,
        model_type=job.source.model.config.model_type,
        model_hash=job.model_hash(checksums),
        source_hash=job.source_hash,
        dtype=job.dtype,
        devices=job.devices,
        layers=job.source.layers,
        placement=job.placement,
        files=dict(sorted(files.items())),
        weight_format=dict(job.weight_formats),
    )


def _refuse_if_too_large(job: SplitJob, folder: Path) -> None:
    there = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    missing = job.total_bytes + SPARE_BYTES - there - shutil.disk_usage(folder).free
    if missing > 0:
        raise CheckpointError(
            f"{folder.parent}: the split takes {job.total_bytes / 1e9:.2f} GB, {missing / 1e9:.2f} GB more than is "
            "free; free some space, or name a folder on another disk"
        )


def _open(
    job: SplitJob, partial: Partial, journal: Journal | None, hashing: Hashing
) -> tuple[dict[str, ShardWriter], Journal | None]:
    """The files as the journal has them; new ones where there is none, or where they are not what it says."""
    if journal is not None:
        writers: dict[str, ShardWriter] = {}
        try:
            for name, entries in job.entries.items():
                writers[name] = ShardWriter(partial.path / name, entries, hashing, journal.files[name])
        except (CheckpointError, OSError, KeyError):
            for writer in writers.values():
                writer.close()
            partial.clear()
        else:
            return writers, journal
    return {name: ShardWriter(partial.path / name, entries, hashing) for name, entries in job.entries.items()}, None


def _write_step(job: SplitJob, step: Step, writers: Mapping[str, ShardWriter], checking: Executor) -> dict[str, int]:
    """The checksums of its tensors, taken while they are written."""
    parts, named = _read(job, step)
    checked = {name: checking.submit(_crc32, pieces) for name, pieces in named.items()}
    _write_parts(job, step, writers, parts)
    return {name: checksum.result() for name, checksum in checked.items()}


def _write_parts(job: SplitJob, step: Step, writers: Mapping[str, ShardWriter], parts: Pieces) -> None:
    if isinstance(step, str):
        writers[BS_NAME].add(step, parts[step])
        return
    layer, expert, holders = step
    stored: dict[WeightFormat, Pieces] = {}
    for device in holders:
        weight_format = job.weight_format(device)
        if weight_format not in stored:
            stored[weight_format] = parts if weight_format == job.dtype else _encoded(parts, weight_format, layer)
        for part, pieces in stored[weight_format].items():
            writers[shard_name(device)].add(tensor_name(layer.index, expert, part), pieces)


def _read(job: SplitJob, step: Step) -> tuple[Pieces, Pieces]:
    """What a step writes, by part and by its name in the split, in the dtype of the job."""
    if isinstance(step, str):
        parts = {step: [job.source.checkpoint.plain(step)]}
        return parts, parts
    layer, expert, _ = step
    parts = canonical_expert(job, layer, expert)
    return parts, {tensor_name(layer.index, expert, part): pieces for part, pieces in parts.items()}


def canonical_expert(job: SplitJob, layer: Layer, expert: int) -> Pieces:
    """By part, as `FfnSpec.shapes` names them, in the dtype of the job. Raises CheckpointError."""
    module = job.source.model.get_submodule(layer.path)
    weights = job.source.checkpoint.expert(layer.path, expert)
    if module.is_transposed or (module.has_gate and not module.is_concatenated):
        tensors = canonical(module, {name: torch.cat(pieces) for name, pieces in weights.items()})
        parts = {part: [tensor] for part, tensor in tensors.items()}
    else:
        parts = {name.replace("_proj", ""): pieces for name, pieces in weights.items()}
    if all(piece.dtype == DTYPES[job.dtype] for pieces in parts.values() for piece in pieces):
        return {part: parts[part] for part in layer.spec.shapes()}
    return _encoded(parts, job.dtype, layer)


def _encoded(parts: Pieces, weight_format: WeightFormat, layer: Layer) -> Pieces:
    tensors = {part: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for part, pieces in parts.items()}
    try:
        return {part: [tensor] for part, tensor in encode_expert(tensors, weight_format, layer.spec).items()}
    except CheckpointError as error:
        raise CheckpointError(f"{layer.path}: {error}") from error


def _crc32(pieces: Iterable[torch.Tensor]) -> int:
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(raw_bytes(piece), checksum)
    return checksum
