"""Write and read the tensors of a checkpoint with torch's distributed checkpoint (DCP), and copy them for async saves.

DCP checkpoints load on any number of ranks. DCP stores its metadata and all non-tensors as pickles. mmtrain saves only
tensors, with a JSON index (``metadata.py``), and refuses anything else when loading. No checkpoint can run code.

:class:`Stage` copies a training state, so that a thread can write the copy while training changes the state. Training
waits only for the copy. The memory for it is allocated once, by a thread at the start of the run, and reused, since
allocating pages takes longer than filling them. For a GPU the memory is pinned, and one synchronisation waits for the
copies of all tensors. On the CPU, NumPy copies in one thread. torch would split each of thousands of tensors over all
threads. That gains little, because memory bandwidth is the limit, and costs a wait per tensor if the cores are busy.
"""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, Metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from mmtrain.errors import SharedError, UserError
from mmtrain.parallel.strategy import AVERAGE, MODEL, StateDict, to_local
from mmtrain.train.checkpoint.metadata import read_index, write_index


class Stage:
    """Reusable CPU memory for one copy of a training state."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None

    def prepare(self, tensors: StateDict) -> None:
        """Start allocating memory for a copy of ``tensors`` in a thread. Only shapes and dtypes are used."""
        self.close()
        shapes = [(key, to_local(tensor).shape, tensor.dtype, tensor.is_cuda) for key, tensor in _flat(tensors)]

        def allocate() -> None:
            self._copies.update({key: _memory(shape, dtype, pinned) for key, shape, dtype, pinned in shapes})

        self._thread = threading.Thread(target=allocate, name="staging")
        self._thread.start()

    @torch.no_grad()
    def copy(self, tensors: StateDict) -> StateDict:
        """Copy ``tensors`` to the CPU. The result is valid until the next call. DTensors stay DTensors."""
        self.close()
        cuda = False
        for key, tensor in _flat(tensors):
            source, memory = to_local(tensor).detach(), self._copies.get(key)
            if memory is None or (memory.shape, memory.dtype) != (source.shape, source.dtype):
                memory = self._copies[key] = _memory(source.shape, source.dtype, source.is_cuda)
            if source.is_cuda:
                memory.copy_(source, non_blocking=True)
                cuda = True
            else:
                np.copyto(memory.numpy(), source.numpy())
        if cuda:
            torch.cuda.current_stream().synchronize()
        return {
            section: {name: _like(tensor, self._copies[section, name]) for name, tensor in named.items()}
            for section, named in tensors.items()
        }

    def close(self) -> None:
        """Wait for the thread that :meth:`prepare` started."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _flat(tensors: StateDict) -> list[tuple[tuple[str, str], Tensor]]:
    return [((section, name), tensor) for section, named in tensors.items() for name, tensor in named.items()]


def _memory(shape: torch.Size, dtype: torch.dtype, pinned: bool) -> Tensor:
    """Allocate a CPU tensor whose pages are already mapped."""
    memory = torch.empty(shape, dtype=dtype, pin_memory=pinned)
    memory.numpy().fill(0)  # touch the pages now, not during the first copy
    return memory


def _like(tensor: Tensor, copied: Tensor) -> Tensor:
    """Return ``copied`` as a DTensor if ``tensor`` is one. (``DTensor.from_local`` would move it to another device.)"""
    return DTensor(copied, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copied


class _Writer(FileSystemWriter):
    """DCP writer that writes mmtrain's JSON index instead of DCP's pickle."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {written.index: written.storage_data for rank in results for written in rank}
        write_index(Path(self.path), metadata)


class _Reader(FileSystemReader):
    """DCP reader that uses an index that was checked before."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _TensorsOnly(DefaultLoadPlanner):
    """Load planner that refuses entries other than tensors, which DCP would unpickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(
            f"the checkpoint contains {read_item.dest_index.fqn} as an object instead of a tensor, which could run"
            " code: not loaded. Use another checkpoint"
        )


def write_tensors(folder: Path, tensors: StateDict, group: dist.ProcessGroup | None) -> None:
    """Write the tensors of all ranks to ``folder``. All ranks of ``group`` call it together.

    Args:
        tensors: tensors or DTensors of this rank. Ranks may have tensors of different names.
        group: process group of the ranks, or None for a single process.

    Raises:
        OSError, RuntimeError, CheckpointException: if a rank cannot write.
    """
    with _no_group_warning():
        writer = _Writer(folder, sync_files=True, overwrite=True)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def read_tensors(folder: Path, tensors: StateDict, *, alone: bool) -> None:
    """Load ``tensors`` in place from the checkpoint in ``folder``.

    Args:
        alone: only this process reads. Otherwise all ranks of the default group call it together.

    Raises:
        UserError: if the checkpoint is damaged, is not one of mmtrain, or contains another model.
    """
    index = _fitting_index(folder, tensors)  # checked here, since DCP's error messages hide the cause
    try:
        with _no_group_warning():
            dcp.load(tensors, storage_reader=_Reader(folder, index), planner=_TensorsOnly(), no_dist=alone)
    except dcp.api.CheckpointException as error:  # DCP raises it on all ranks
        raise SharedError(
            f"{folder} cannot be read ({_cause(error)}). Use another checkpoint, or restore its files"
        ) from error


def _fitting_index(folder: Path, tensors: StateDict) -> Metadata:
    """Read the index of ``folder``. Raise UserError unless it contains all of ``tensors``, with the same shapes."""
    index = read_index(folder)
    present = index.state_dict_metadata
    wrong = []
    for (section, name), tensor in _flat(tensors):
        found = present.get(f"{section}.{name}")
        label = name if section == MODEL else f"{section} of {name}"
        if not isinstance(found, TensorStorageMetadata):
            wrong.append(f"{label} is missing")
        elif found.size != tensor.shape:
            wrong.append(f"{label} has shape {tuple(found.size)} instead of {tuple(tensor.shape)}")
        elif found.properties.dtype.is_floating_point != tensor.dtype.is_floating_point:
            wrong.append(f"{label} has dtype {found.properties.dtype} instead of {tensor.dtype}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{folder} does not contain the model that its configuration describes: {'; '.join(wrong[:5])}{more}."
            " It may have been written by another version of mmtrain (see code.json in the run folder)"
        )
    return index


def _cause(error: dcp.api.CheckpointException) -> str:
    """Return the message of the first error that DCP wrapped."""
    cause = next(iter(error.failures.values()))[0]
    if isinstance(cause, UnpicklingError):  # torch's message advises loading it nevertheless
        return "a file contains something other than tensors, which could run code: not loaded"
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0][:200]}" if str(cause) else type(cause).__name__


def read_weights(model: nn.Module, folder: Path, *, averaged: bool) -> None:
    """Load the trained weights of a checkpoint into ``model``, or the averaged weights. No collective."""
    read_tensors(folder, _weights(model, averaged), alone=True)


def check_weights(model: nn.Module, folder: Path, *, averaged: bool) -> None:
    """Raise UserError if shapes in the checkpoint differ from those of ``model``, which may be on the meta device."""
    _fitting_index(folder, _weights(model, averaged))


def _weights(model: nn.Module, averaged: bool) -> StateDict:
    return {AVERAGE if averaged else MODEL: {name: p.detach() for name, p in model.named_parameters()}}


class _no_group_warning(warnings.catch_warnings):
    """Suppress torch's warning that a single process uses no process group."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
