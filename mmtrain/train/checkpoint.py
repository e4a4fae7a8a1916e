"""Checkpoints that are complete or do not exist.

A checkpoint is a folder ``step_00001234``: the sharded tensors as torch's distributed checkpoint (DCP) writes them,
``state.json`` (where the run stands) and ``manifest.json`` (size and SHA-256 of every file). It is written under
another name, made durable with fsync and then renamed; at load the manifest is verified, and the newest valid one
wins. The layout does not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp

from mmtrain.errors import UserError
from mmtrain.parallel.ranks import Ranks
from mmtrain.train.dcp_metadata import SafeReader

logger = logging.getLogger("mmtrain")

_MANIFEST = "manifest.json"
_STATE = "state.json"


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int = 2, *, clean: bool = True) -> None:
        """``clean`` removes what an interrupted save left: only for the process that trains in this folder."""
        self.folder = folder
        self.ranks = ranks
        self.keep = keep
        if ranks.main and clean:
            folder.mkdir(parents=True, exist_ok=True)
            for torn in folder.glob("*.partial"):
                shutil.rmtree(torn, ignore_errors=True)
        ranks.barrier()

    def save(self, step: int, tensors: dict[str, Any], state: dict[str, Any], best: int | None = None) -> None:
        """Write the checkpoint of ``step``; afterwards delete old ones but the newest ``keep`` and step ``best``.

        Args:
            tensors: nested dicts of tensors (the same keys on all ranks).
            state: JSON values.

        Raises:
            UserError: when the disk is full or the folder cannot be written; the older checkpoints stay.
        """
        final = self.folder / _folder_name(step)
        if final.exists():
            return
        partial = final.with_suffix(".partial")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.save(tensors, storage_writer=dcp.FileSystemWriter(partial, sync_files=True, overwrite=True))
            if self.ranks.main:
                (partial / _STATE).write_text(json.dumps(state, indent=1))
                _write_manifest(partial)
                os.rename(partial, final)
                _sync(self.folder)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            cause = _disk_error(error)
            if cause is None:
                raise
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"{final}: the checkpoint could not be written ({cause}). Free or grow the disk, or give another"
                " folder with --run-dir; the last good checkpoint is untouched and the same command goes on from it"
            ) from error
        self.ranks.barrier()
        if self.ranks.main:
            self._prune(best)

    def newest(self) -> Path | None:
        """The newest checkpoint that passes its manifest; torn ones are passed over with a warning."""
        for path in sorted(self.folder.glob("step_*"), reverse=True):
            if path.suffix == ".partial":
                continue
            fault = verify(path)
            if fault is None:
                return path
            if self.ranks.main:
                logger.warning("%s is not used: %s", path, fault)
        return None

    def at(self, step: int) -> Path:
        return self.folder / _folder_name(step)

    def _prune(self, best: int | None) -> None:
        complete = sorted(p for p in self.folder.glob("step_*") if (p / _MANIFEST).exists())
        for path in complete[: -self.keep]:
            if best is None or path != self.at(best):
                shutil.rmtree(path)


def load_tensors(path: Path, tensors: dict[str, Any]) -> None:
    """Fill ``tensors`` (nested dicts, in place) from checkpoint ``path``.

    Raises:
        UserError: for metadata that no checkpoint of ours has, or weights of another model.
    """
    reader = SafeReader(path)
    there = reader.read_metadata().state_dict_metadata  # here, since DCP would bury what is wrong with it
    wrong = []
    for part in ("model", "average"):
        for name, tensor in tensors.get(part, {}).items():
            found = getattr(there.get(f"{part}.{name}"), "size", None)
            if found is None:
                wrong.append(f"{name} is not in it")
            elif found != tensor.shape:
                wrong.append(f"{name} is {tuple(found)} in it and {tuple(tensor.shape)} in the model")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{path} holds another model than its configuration describes: {'; '.join(wrong[:5])}{more}."
            " It may be of another version of mmtrain (see code.json in the run folder)"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader)


def load_state(path: Path) -> dict[str, Any]:
    """The JSON part of checkpoint ``path``."""
    return json.loads((path / _STATE).read_text())


def verify(path: Path) -> str | None:
    """What is wrong with checkpoint ``path``, or None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        for name, entry in manifest.items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
            if _digest(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {_MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _write_manifest(folder: Path) -> None:
    files = sorted(p for p in folder.iterdir() if p.is_file())
    manifest = {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (folder / _STATE, folder / _MANIFEST, folder):
        _sync(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(error: BaseException) -> str | None:
    """The operating system's words, when ``error`` or what DCP wrapped in it is about the disk."""
    if isinstance(error, dcp.api.CheckpointException):
        inner = [wrapped[0] for wrapped in error.failures.values()]
        return next((found for e in inner if (found := _disk_error(e))), None)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    # torch's archive writer reports a short write as a RuntimeError of its own
    archive = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    return "a write was cut short; is the disk full?" if archive else None
