"""Checkpoints that are complete or do not exist.

A checkpoint is a folder ``step_00001234``: the tensors as torch's distributed checkpoint (DCP) writes them,
``state.json`` (where the run stands), ``config.yaml`` and ``manifest.json`` (size and SHA-256 of every file). It is
written under another name, made durable with fsync and then renamed. At load the manifest is verified, and the newest
valid checkpoint wins. The layout depends neither on the number of ranks nor on the strategy.

A save copies the state aside and returns; a thread of each rank writes the copy while training goes on. There is no
generator state to save: all randomness follows from the seed and the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from mmtrain.errors import SharedError
from mmtrain.files import read_json, sync
from mmtrain.log import logger
from mmtrain.parallel.ranks import PATIENT, Ranks
from mmtrain.parallel.strategy import StateDict
from mmtrain.runs.folder import checkpoint_name, checkpoints_in, unfinished_in
from mmtrain.train.checkpoint.metadata import DATA_FILE, INDEX, PICKLED
from mmtrain.train.checkpoint.tensor_files import Stage, write_tensors

MANIFEST, _STATE, _CONFIG = "manifest.json", "state.json", "config.yaml"

#: Of a manifest: size and SHA-256 of each file, by name.
Entries = dict[str, dict[str, Any]]


def entries_of(paths: Iterable[Path]) -> Entries:
    """Size and digest of each of ``paths``, by name."""
    return {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in paths}


def write_manifest(folder: Path, entries: Entries) -> None:
    """Write the manifest, durably."""
    path = folder / MANIFEST
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1))
    sync(path)
    sync(folder)


def verify(folder: Path, share: int = 0, of: int = 1) -> str | None:
    """What is wrong with the checkpoint in ``folder``, or None.

    Every ``of``-th file is hashed, from number ``share`` on, so that ranks can divide the work; presence and size are
    looked at for all.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = set(manifest)
        for name in (_STATE, _CONFIG):
            if name not in names:
                return f"its {MANIFEST} does not name {name}"
        if not names & {INDEX, PICKLED}:
            return f"its {MANIFEST} does not name {INDEX}"
        strange = sorted(name for name in names - {_STATE, _CONFIG, INDEX, PICKLED} if not DATA_FILE.fullmatch(name))
        if strange:
            return f"its {MANIFEST} names {strange[0]!r}, which is no file of a checkpoint"
        for number, (name, entry) in enumerate(manifest.items()):
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
            if number % of == share and _digest(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
        present = {file.name for file in folder.iterdir() if file.name == INDEX or DATA_FILE.fullmatch(file.name)}
        if unnamed := sorted(present - names):  # it would be read without a check
            return f"its {MANIFEST} does not name {unnamed[0]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointStore:
    """The checkpoints of one run folder. All ranks call its methods together, except :meth:`at`."""

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        asynchronous: bool = False,
        config: str = "",
        clean: bool = True,
    ) -> None:
        """
        Args:
            keep: how many of the newest stay.
            keep_every: those of every so many-th step stay as well.
            asynchronous: :meth:`save` returns before the files are written.
            config: the run's configuration, a copy of which goes into every checkpoint.
            clean: remove what an interrupted save left: only for the process that trains in this folder.
        """
        self.folder, self.ranks, self.keep, self.keep_every, self.config = folder, ranks, keep, keep_every, config
        # the writing threads talk over a group of their own, beside the training's collectives
        self._group = dist.new_group(backend="gloo", group_desc=PATIENT) if ranks.world > 1 else None
        self._stage = Stage() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._newest_valid: Path | None = None
        self._torn: set[Path] = set()
        _, error = _attempt(self._clean) if ranks.main and clean else (None, None)
        words = ranks.gather(_words(error))[0]
        if words is not None:
            raise SharedError(f"{folder}: checkpoints cannot be written there ({words}): choose another --run-dir")

    def _clean(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for torn in unfinished_in(self.folder):
            shutil.rmtree(torn, ignore_errors=True)

    # ------------------------------------------------------------------ saving

    def prepare(self, tensors: StateDict) -> None:
        """Take the memory that saves of such ``tensors`` will copy them to, in the background; optional."""
        if self._stage is not None:
            self._stage.prepare(tensors)

    def save(self, step: int, tensors: StateDict, state: dict[str, Any], best: int | None = None) -> None:
        """Begin the checkpoint of ``step``; once it stands, delete all but the newest ``keep`` and the others to stay.

        Args:
            tensors: ranks may hold different names.
            state: JSON values.
            best: a step whose checkpoint stays.

        Raises:
            SharedError: when the disk is full or the folder cannot be written (the save before this one too, if it
                was asynchronous); the older checkpoints stay.
        """
        self.wait()
        if self._newest_valid == self.at(step):
            return
        if self._stage is None:
            self._write(step, tensors, state, best)
            self._raise()
            return
        staged = self._stage.copy(tensors)
        self._thread = threading.Thread(target=self._write, args=(step, staged, dict(state), best), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is under way any more.

        Raises:
            SharedError: when the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    @property
    def failed(self) -> bool:
        """Whether a save has failed on this rank: :meth:`wait` will say why."""
        return self._error is not None

    def close(self) -> None:
        """Wait for the thread, whatever became of its save."""
        if self._thread is not None:
            self._thread.join()
        if self._stage is not None:
            self._stage.close()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, tensors: StateDict, state: dict[str, Any], best: int | None) -> None:
        """Write, commit, prune; an error is kept for the training thread, on every rank."""
        try:
            self._error = self._commit(step, tensors, state, best)
        except Exception as error:  # of the ranks' talk: one of them is gone
            self._error = error

    def _commit(self, step: int, tensors: StateDict, state: dict[str, Any], best: int | None) -> BaseException | None:
        final = self.at(step)
        aside = final.with_suffix(".partial")

        def write() -> Entries:
            write_tensors(aside, tensors, self._group)
            return entries_of(aside.glob(f"__{self.ranks.rank}_*"))

        def commit(entries: Entries) -> None:
            (aside / _STATE).write_text(json.dumps(state, indent=1))
            (aside / _CONFIG).write_text(self.config)
            small = [aside / _STATE, aside / _CONFIG]
            for path in small:
                sync(path)
            write_manifest(aside, entries | entries_of([*small, aside / INDEX]))
            if final.exists():  # torn, or it would be the newest
                self._drop(final)
            os.rename(aside, final)
            sync(self.folder)
            self._prune(best)

        mine, error = _attempt(write)
        written = self.ranks.gather((mine, _words(error)), self._group)
        words = next((said for _, said in written if said is not None), None)
        if words is None:
            if self.ranks.main:
                entries = {name: entry for found, _ in written for name, entry in found.items()}
                _, error = _attempt(lambda: commit(entries))
            words = self.ranks.gather(_words(error), self._group)[0]
        if words is None:
            self._newest_valid = final
            self._torn.discard(final)
            return None
        if self.ranks.main:
            shutil.rmtree(aside, ignore_errors=True)
        if error is not None and _disk_error(error) is None:
            return error
        return SharedError(
            f"{final}: the checkpoint could not be written ({words}). Free or grow the disk, or give another"
            " folder with --run-dir; the last good checkpoint is untouched and the same command goes on from it"
        )

    def _prune(self, best: int | None) -> None:
        found = checkpoints_in(self.folder)
        good = [step for step, path in found.items() if path not in self._torn and (path / MANIFEST).exists()]
        for step in good[: -self.keep]:
            path = found[step]
            if step != best and not (self.keep_every and step % self.keep_every == 0):
                _, error = _attempt(partial(self._drop, path))
                if error is not None:  # the new one stands all the same
                    logger.warning("%s could not be deleted: %s", path, _words(error))

    def _drop(self, path: Path) -> None:
        """Delete a checkpoint, so that a kill in between leaves no part of it under its name."""
        aside = path.with_suffix(".old.partial")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        shutil.rmtree(aside, ignore_errors=True)

    # ------------------------------------------------------------------ finding

    def newest(self) -> Path | None:
        """The newest checkpoint that passes its manifest; torn ones are passed over with a warning.

        The ranks share the work of hashing, and all come to the same answer.
        """
        steps = self.ranks.gather(list(checkpoints_in(self.folder)))[0]
        for step in reversed(steps):
            path = self.at(step)
            fault = self._fault(path)
            if fault is None:
                self._newest_valid = path
                return path
            self._torn.add(path)
            if self.ranks.main:
                logger.warning("%s is not used: %s", path, fault)
        return None

    def whole(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is there and passes its manifest."""
        return self._fault(self.at(step)) is None

    def _fault(self, path: Path) -> str | None:
        """As :func:`verify`, the same on every rank."""
        faults = self.ranks.gather(verify(path, self.ranks.rank, self.ranks.world))
        return next((fault for fault in faults if fault is not None), None)

    def at(self, step: int) -> Path:
        """The folder of the checkpoint of ``step``, which may not exist."""
        return self.folder / checkpoint_name(step)


def load_state(path: Path) -> dict[str, Any]:
    """The JSON part of checkpoint ``path``.

    Raises:
        SharedError: when it is missing or damaged.
    """
    return read_json(path / _STATE, f"use another checkpoint than {path.name}, or restore the file", kind=SharedError)


def _attempt(action: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    try:
        return action(), None
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
        return None, error


def _words(error: BaseException | None) -> str | None:
    if error is None:
        return None
    return _disk_error(error) or f"{type(error).__name__}: {error}"


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
