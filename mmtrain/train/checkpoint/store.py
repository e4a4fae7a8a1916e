"""Save, verify, find and delete the checkpoints of a run folder. A checkpoint is either complete or does not exist.

A checkpoint is a folder ``step_00001234``. It contains the tensors in the format of torch's distributed checkpoint
(DCP), ``state.json`` (progress of the run), ``config.yaml`` and ``manifest.json`` (size and SHA-256 of every file). It
is written under a temporary name, synced to disk and then renamed. Loading verifies the manifest and uses the newest
valid checkpoint. The layout does not depend on the number of ranks or on the strategy.

An asynchronous save copies the state and returns. A thread of each rank writes the copy while training continues.
Random generator states are not saved, since all randomness is derived from the seed and the step.
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

#: Entries of a manifest: size and SHA-256 of each file, by name.
Entries = dict[str, dict[str, Any]]


def entries_of(paths: Iterable[Path]) -> Entries:
    """Compute the size and SHA-256 of each file of ``paths``, by name."""
    return {p.name: {"size": p.stat().st_size, "sha256": _digest(p)} for p in paths}


def write_manifest(folder: Path, entries: Entries) -> None:
    """Write the manifest to ``folder``, with fsync."""
    path = folder / MANIFEST
    path.write_text(json.dumps(dict(sorted(entries.items())), indent=1))
    sync(path)
    sync(folder)


def verify(folder: Path, share: int = 0, of: int = 1) -> str | None:
    """Check the checkpoint in ``folder`` against its manifest. Return a description of the first fault, or None.

    The presence and size of all files are checked. Only every ``of``-th file, starting with file ``share``, is hashed,
    so that ranks can divide the work.
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
            return f"its {MANIFEST} names {strange[0]!r}, which is not a file of a checkpoint"
        for number, (name, entry) in enumerate(manifest.items()):
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
            if number % of == share and _digest(file) != entry["sha256"]:
                return f"{name} does not match its checksum"
        present = {file.name for file in folder.iterdir() if file.name == INDEX or DATA_FILE.fullmatch(file.name)}
        if unnamed := sorted(present - names):  # DCP would read it unchecked
            return f"its {MANIFEST} does not name {unnamed[0]}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointStore:
    """The checkpoints of one run folder. All ranks call each method together, except :meth:`at`."""

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
            keep: number of newest checkpoints to keep.
            keep_every: also keep checkpoints whose step is a multiple of this.
            asynchronous: :meth:`save` returns before the files are written.
            config: configuration of the run as YAML, copied into every checkpoint.
            clean: delete the remains of interrupted saves. Only for the process that trains in this folder.

        Raises:
            SharedError: if the folder cannot be written.
        """
        self.folder, self.ranks, self.keep, self.keep_every, self.config = folder, ranks, keep, keep_every, config
        # The writing threads use a separate group, since they run in parallel with the collectives of training.
        self._group = dist.new_group(backend="gloo", group_desc=PATIENT) if ranks.world > 1 else None
        self._stage = Stage() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._newest_valid: Path | None = None
        self._damaged: set[Path] = set()
        _, error = _attempt(self._clean) if ranks.main and clean else (None, None)
        problem = ranks.gather(_message(error))[0]
        if problem is not None:
            raise SharedError(f"{folder}: cannot write checkpoints there ({problem}). Choose another --run-dir")

    def _clean(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in unfinished_in(self.folder):
            shutil.rmtree(unfinished, ignore_errors=True)

    # ------------------------------------------------------------------ saving

    def prepare(self, tensors: StateDict) -> None:
        """Allocate the memory for asynchronous saves of ``tensors`` in the background. Optional."""
        if self._stage is not None:
            self._stage.prepare(tensors)

    def save(self, step: int, tensors: StateDict, state: dict[str, Any], best: int | None = None) -> None:
        """Save a checkpoint of ``step``, then delete old ones except those of ``keep``, ``keep_every`` and ``best``.

        An asynchronous store only copies the tensors and returns.

        Args:
            tensors: tensors of this rank. Ranks may have tensors of different names.
            state: JSON values.
            best: step of the best checkpoint, which is kept.

        Raises:
            SharedError: if this save, or the previous asynchronous one, failed, for example because the disk is full.
                Older checkpoints are not affected.
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
        """Wait until no save is running.

        Raises:
            SharedError: if the last save failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    @property
    def failed(self) -> bool:
        """True if a save failed on this rank. :meth:`wait` then raises its error."""
        return self._error is not None

    def close(self) -> None:
        """Wait for the writing thread. Errors of its save are ignored."""
        if self._thread is not None:
            self._thread.join()
        if self._stage is not None:
            self._stage.close()

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _write(self, step: int, tensors: StateDict, state: dict[str, Any], best: int | None) -> None:
        """Write the checkpoint and delete old ones. An error is stored for the training thread, on every rank."""
        try:
            self._error = self._commit(step, tensors, state, best)
        except Exception as error:  # a collective failed because a rank has ended
            self._error = error

    def _commit(self, step: int, tensors: StateDict, state: dict[str, Any], best: int | None) -> BaseException | None:
        """Write the checkpoint under a temporary name and rename it. Return the error, if any, on every rank."""
        final = self.at(step)
        temporary = final.with_suffix(".partial")

        def write() -> Entries:
            write_tensors(temporary, tensors, self._group)
            return entries_of(temporary.glob(f"__{self.ranks.rank}_*"))

        def commit(entries: Entries) -> None:
            (temporary / _STATE).write_text(json.dumps(state, indent=1))
            (temporary / _CONFIG).write_text(self.config)
            small = [temporary / _STATE, temporary / _CONFIG]
            for path in small:
                sync(path)
            write_manifest(temporary, entries | entries_of([*small, temporary / INDEX]))
            if final.exists():  # it is damaged, or the run would have resumed from it
                self._drop(final)
            os.rename(temporary, final)
            sync(self.folder)
            self._prune(best)

        local, error = _attempt(write)
        written = self.ranks.gather((local, _message(error)), self._group)
        problem = next((message for _, message in written if message is not None), None)
        if problem is None:
            if self.ranks.main:
                entries = {name: entry for found, _ in written for name, entry in found.items()}
                _, error = _attempt(lambda: commit(entries))
            problem = self.ranks.gather(_message(error), self._group)[0]
        if problem is None:
            self._newest_valid = final
            self._damaged.discard(final)
            return None
        if self.ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)
        if error is not None and _disk_error(error) is None:
            return error
        return SharedError(
            f"{final}: the checkpoint could not be written ({problem}). Free some disk space, or choose another folder"
            " with --run-dir. The last good checkpoint is intact; the same command continues from it"
        )

    def _prune(self, best: int | None) -> None:
        """Delete old checkpoints except those to keep."""
        found = checkpoints_in(self.folder)
        good = [step for step, path in found.items() if path not in self._damaged and (path / MANIFEST).exists()]
        for step in good[: -self.keep]:
            path = found[step]
            if step != best and not (self.keep_every and step % self.keep_every == 0):
                _, error = _attempt(partial(self._drop, path))
                if error is not None:  # the new checkpoint is complete nevertheless
                    logger.warning("%s: the old checkpoint could not be deleted: %s", path, _message(error))

    def _drop(self, path: Path) -> None:
        """Delete a checkpoint. Rename it first, so that an interruption leaves no incomplete checkpoint."""
        temporary = path.with_suffix(".old.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        os.rename(path, temporary)
        shutil.rmtree(temporary, ignore_errors=True)

    # ------------------------------------------------------------------ finding

    def newest(self) -> Path | None:
        """Return the newest valid checkpoint, or None. Log a warning for each damaged one that is newer.

        The ranks divide the hashing. The result is the same on every rank.
        """
        steps = self.ranks.gather(list(checkpoints_in(self.folder)))[0]
        for step in reversed(steps):
            path = self.at(step)
            fault = self._fault(path)
            if fault is None:
                self._newest_valid = path
                return path
            self._damaged.add(path)
            if self.ranks.main:
                logger.warning("%s is not used: it is damaged (%s)", path, fault)
        return None

    def whole(self, step: int) -> bool:
        """Return whether the checkpoint of ``step`` exists and matches its manifest."""
        return self._fault(self.at(step)) is None

    def _fault(self, path: Path) -> str | None:
        """Return the first fault that :func:`verify` finds on any rank, or None. Equal on every rank."""
        faults = self.ranks.gather(verify(path, self.ranks.rank, self.ranks.world))
        return next((fault for fault in faults if fault is not None), None)

    def at(self, step: int) -> Path:
        """Return the folder of the checkpoint of ``step``. It may not exist."""
        return self.folder / checkpoint_name(step)


def load_state(path: Path) -> dict[str, Any]:
    """Read ``state.json`` of the checkpoint ``path``.

    Raises:
        SharedError: if the file is missing or damaged.
    """
    return read_json(path / _STATE, f"use another checkpoint than {path.name}, or restore the file", kind=SharedError)


def _attempt(action: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Call ``action``. Return its result and None, or None and the error."""
    try:
        return action(), None
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is a BaseException
        return None, error


def _message(error: BaseException | None) -> str | None:
    """Return the text of ``error`` for the user, or None."""
    if error is None:
        return None
    return _disk_error(error) or f"{type(error).__name__}: {error}"


def _disk_error(error: BaseException) -> str | None:
    """Return the operating system's message if ``error``, or an error that DCP wrapped, is a disk error."""
    if isinstance(error, dcp.api.CheckpointException):
        inner = [wrapped[0] for wrapped in error.failures.values()]
        return next((found for e in inner if (found := _disk_error(e))), None)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__ or cause.__context__
    # torch's archive writer reports a short write as a RuntimeError.
    archive = "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    return "incomplete write; the disk may be full" if archive else None
