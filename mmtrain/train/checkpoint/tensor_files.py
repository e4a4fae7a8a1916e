"""The tensors of a checkpoint: on disk as torch's distributed checkpoint (DCP), and the copy that a thread writes.

DCP fits any number of ranks. It would keep its metadata, and all that is no tensor, as pickles. We save tensors only,
with an index in JSON (``metadata.py``), and refuse anything else at load: no checkpoint can run code.

:class:`Stage` copies a training state into memory of its own, which a thread can write while the training changes the
state. The training waits for the copy, so the copy is all that it may wait for. The memory is taken once, by a thread
at the start of the run, since the pages of fresh memory take longer to come by than to fill; every copy goes into the
same. From a GPU the memory is pinned, and the copies of all tensors are queued before one wait for all of them. On the
CPU numpy copies, in one thread: torch would share out each of thousands of tensors among all threads, which gains
little on the memory bus, and where the cores are busy, with a save before this or another rank, waits for them every
time.
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
    """Memory for one copy of a training state on the CPU."""

    def __init__(self) -> None:
        self._copies: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None

    def prepare(self, tensors: StateDict) -> None:
        """Take the memory for a copy of ``tensors`` in the background, and return at once. Values are not looked at."""
        self.close()
        shapes = [(key, to_local(tensor).shape, tensor.dtype, tensor.is_cuda) for key, tensor in _flat(tensors)]

        def take() -> None:
            self._copies.update({key: _memory(shape, dtype, pinned) for key, shape, dtype, pinned in shapes})

        self._thread = threading.Thread(target=take, name="staging")
        self._thread.start()

    @torch.no_grad()
    def copy(self, tensors: StateDict) -> StateDict:
        """A copy of ``tensors``, which stays as it is until the next call. A DTensor stays one, its part on the CPU."""
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
            part: {name: _like(tensor, self._copies[part, name]) for name, tensor in named.items()}
            for part, named in tensors.items()
        }

    def close(self) -> None:
        """Wait for the thread of :meth:`prepare`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _flat(tensors: StateDict) -> list[tuple[tuple[str, str], Tensor]]:
    return [((part, name), tensor) for part, named in tensors.items() for name, tensor in named.items()]


def _memory(shape: torch.Size, dtype: torch.dtype, pinned: bool) -> Tensor:
    memory = torch.empty(shape, dtype=dtype, pin_memory=pinned)
    memory.numpy().fill(0)  # or the system would look for the pages during the first copy
    return memory


def _like(tensor: Tensor, copied: Tensor) -> Tensor:
    """``copied`` in the guise of ``tensor``. (``DTensor.from_local`` would move it to the device of the mesh.)"""
    return DTensor(copied, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else copied


class _Writer(FileSystemWriter):
    """DCP's writer to a folder, with an index of ours in place of DCP's pickle."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {written.index: written.storage_data for rank in results for written in rank}
        write_index(Path(self.path), metadata)


class _Reader(FileSystemReader):
    """DCP's reader of a folder, with an index that was checked."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _TensorsOnly(DefaultLoadPlanner):
    """Refuses entries that are no tensors: DCP would unpickle them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise UserError(f"a checkpoint holds {read_item.dest_index.fqn} as an object and not as a tensor: not loaded")


def write_tensors(folder: Path, tensors: StateDict, group: dist.ProcessGroup | None) -> None:
    """Write ``tensors``, DTensors too, of all ranks of ``group``; ranks may have different names.

    Raises:
        OSError, RuntimeError, CheckpointException: when a rank cannot write.
    """
    with _no_group_warning():
        writer = _Writer(folder, sync_files=True, overwrite=True)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def read_tensors(folder: Path, tensors: StateDict, *, alone: bool) -> None:
    """Fill ``tensors`` in place from ``folder``.

    Args:
        alone: this process reads on its own; otherwise all ranks of the default group read together.

    Raises:
        UserError: for an index or files that no checkpoint of ours has, or weights of another model.
    """
    index = _fitting_index(folder, tensors)  # here, since DCP would bury what is wrong with it
    try:
        with _no_group_warning():
            dcp.load(tensors, storage_reader=_Reader(folder, index), planner=_TensorsOnly(), no_dist=alone)
    except dcp.api.CheckpointException as error:  # the same on all ranks that read together
        raise SharedError(
            f"{folder} cannot be read ({_cause(error)}): use another checkpoint, or restore its files"
        ) from error


def _fitting_index(folder: Path, tensors: StateDict) -> Metadata:
    """The index of ``folder``, which has all of ``tensors`` in their shapes."""
    index = read_index(folder)
    there = index.state_dict_metadata
    wrong = []
    for (part, name), tensor in _flat(tensors):
        found = there.get(f"{part}.{name}")
        what = name if part == MODEL else f"{part} of {name}"
        if not isinstance(found, TensorStorageMetadata):
            wrong.append(f"{what} is not in it")
        elif found.size != tensor.shape:
            wrong.append(f"{what} is {tuple(found.size)} in it and {tuple(tensor.shape)} in the model")
        elif found.properties.dtype.is_floating_point != tensor.dtype.is_floating_point:
            wrong.append(f"{what} is {found.properties.dtype} in it and {tensor.dtype} in the model")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{folder} holds another model than its configuration describes: {'; '.join(wrong[:5])}{more}."
            " It may be of another version of mmtrain (see code.json in the run folder)"
        )
    return index


def _cause(error: dcp.api.CheckpointException) -> str:
    cause = next(iter(error.failures.values()))[0]
    if isinstance(cause, UnpicklingError):  # torch's own words advise to load it all the same
        return "a file holds something else than tensors, which could run code: not loaded"
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0][:200]}" if str(cause) else type(cause).__name__


def read_weights(model: nn.Module, folder: Path, *, averaged: bool) -> None:
    """Give ``model`` the trained weights in ``folder``, or their average; on this process's own."""
    read_tensors(folder, _weights(model, averaged), alone=True)


def check_weights(model: nn.Module, folder: Path, *, averaged: bool) -> None:
    """Raise UserError where the shapes in ``folder`` are not those of ``model``, which may be on the meta device."""
    _fitting_index(folder, _weights(model, averaged))


def _weights(model: nn.Module, averaged: bool) -> StateDict:
    return {AVERAGE if averaged else MODEL: {name: p.detach() for name, p in model.named_parameters()}}


class _no_group_warning(warnings.catch_warnings):
    """Without torch's remark that a lone process needs no process group."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
