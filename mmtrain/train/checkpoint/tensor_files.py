"""The tensors of a checkpoint: on disk as torch's distributed checkpoint (DCP), and the copy that a thread writes.

DCP fits any number of ranks. It keeps its metadata, and all that is no tensor, as pickles. We save tensors only, refuse
anything else at load, and unpickle the metadata from a list of allowed types: no checkpoint can run code.

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
import pickle
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from mmtrain.errors import UserError
from mmtrain.parallel.strategy import AVERAGE, MODEL, StateDict, to_local


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


# what DCP itself puts there: its records, shapes, dtypes, and plain containers
_ALLOWED_MODULES = ("torch.distributed.checkpoint.",)
_ALLOWED = {
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and name in {"float32", "float64", "float16", "bfloat16", "int64", "int32", "bool"}
        if dtype or (module, name) in _ALLOWED or module.startswith(_ALLOWED_MODULES):
            return super().find_class(module, name)
        raise UserError(f"a checkpoint's metadata asks for {module}.{name}, which no checkpoint needs: not loaded")


class SafeReader(FileSystemReader):
    """DCP's reader of a folder, with its metadata unpickled from a list of allowed types only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self.fs.concat_path(self.path, ".metadata")
        with self.fs.create_stream(path, "rb") as stream:
            metadata: Metadata = _Unpickler(stream).load()
        if metadata.storage_meta is None:
            raise UserError(f"{path}: not the metadata of a checkpoint")
        metadata.storage_meta.load_id = self.load_id
        return metadata


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
        writer = dcp.FileSystemWriter(folder, sync_files=True, overwrite=True)
        dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def read_tensors(folder: Path, tensors: StateDict, *, alone: bool) -> None:
    """Fill ``tensors`` in place from ``folder``.

    Args:
        alone: this process reads on its own; otherwise all ranks of the default group read together.

    Raises:
        UserError: for metadata that no checkpoint of ours has, or weights of another model.
    """
    reader = SafeReader(folder)
    there = reader.read_metadata().state_dict_metadata  # here, since DCP would bury what is wrong with it
    wrong = []
    for (part, name), tensor in _flat(tensors):
        found = getattr(there.get(f"{part}.{name}"), "size", None)
        what = name if part == MODEL else f"{part} of {name}"
        if found is None:
            wrong.append(f"{what} is not in it")
        elif found != tensor.shape:
            wrong.append(f"{what} is {tuple(found)} in it and {tuple(tensor.shape)} in the model")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{folder} holds another model than its configuration describes: {'; '.join(wrong[:5])}{more}."
            " It may be of another version of mmtrain (see code.json in the run folder)"
        )
    with _no_group_warning():
        dcp.load(tensors, storage_reader=reader, planner=_TensorsOnly(), no_dist=alone)


def read_weights(model: nn.Module, folder: Path, *, averaged: bool) -> None:
    """Give ``model`` the trained weights in ``folder``, or their average; on this process's own."""
    part = AVERAGE if averaged else MODEL
    weights = {name: p.detach() for name, p in model.named_parameters()}
    read_tensors(folder, {part: weights}, alone=True)


class _no_group_warning(warnings.catch_warnings):
    """Without torch's remark that a lone process needs no process group."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
