"""FFCV's Loader of one file, compiled once, asked for batches of given samples and keys.

The Loader brings the reader, the memory managers and the compiled code; its own iterator is not used, since it knows
neither keys nor a stream without end, waits for ever if its thread fails, and hands out memory that it writes again.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from inspect import signature
from typing import Any

import numba
import numpy as np
import torch
from ffcv.loader import Loader
from ffcv.pipeline import PipelineSpec
from numpy.typing import NDArray

from mmtrain.data.beton.augment import Recipe
from mmtrain.data.beton.extra import torch_threads_kept
from mmtrain.data.beton.format import Beton
from mmtrain.data.beton.operation import KeyedDecoder
from mmtrain.errors import UserError

Indices = NDArray[np.int64]
Keys = NDArray[np.uint64]
#: Samples and their keys (None in evaluation).
Request = tuple[Indices, Keys | None]

#: numba's fallback threading layer ends the process when two threads run parallel code at once.
_one_kernel = threading.Lock()
#: Compiled code and the names of its arguments for memory: once in a process, since it takes seconds.
_stages: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}
_log = logging.getLogger("mmtrain")


class Engine:
    """Batches of ``recipe`` from a beton. ``threads`` and ``os_cache`` never change what comes out.

    ``os_cache``: map the file and leave it to the system what stays in memory; else read the pages of ``windows``
    requests at a time, ahead of their use, and drop each when it was used for the last time.
    """

    def __init__(self, beton: Beton, recipe: Recipe, threads: int, os_cache: bool) -> None:
        self.beton, self.recipe, self.os_cache = beton, recipe, os_cache
        self.threads = _at_most(threads)
        with torch_threads_kept():
            self.loader = Loader(
                str(beton.path),
                batch_size=1,
                num_workers=self.threads,
                os_cache=os_cache,
                indices=np.zeros(1, dtype=np.int64),
                pipelines={
                    name: PipelineSpec(name, decoder=KeyedDecoder(recipe)) if name == "image" else None
                    for name in beton.fields
                },
                seed=0,  # without one, it draws one from numpy's global generator
                drop_last=False,
            )
        shared = (_key(recipe), self.threads > 1, os_cache, beton.page_size, *beton.fields)
        if shared not in _stages:
            ((stage, _),) = self.loader.code[0]
            _stages[shared] = stage, [name for name in signature(stage).parameters if "memory_" in name]
        self._stage, self._memory = _stages[shared]

    @contextmanager
    def scheduled(self, requests: Sequence[Request]) -> Iterator[Any]:
        """The memory that ``run`` reads from while it goes through ``requests`` (with ``os_cache``: any)."""
        if self.beton.path.stat().st_size < self.beton.stored:
            raise UserError(f"{self.beton.path}: the file was cut short after the run started; copy it again")
        context = self.loader.memory_manager.schedule_epoch([indices for indices, _ in requests])
        context.__enter__()
        try:
            yield context
        finally:
            context.__exit__(None, None, None)
            for reader in getattr(getattr(context, "executor", None), "threads", []):
                reader.join()

    def run(self, context: Any, request: Request, images: NDArray[Any]) -> None:
        """Fill ``images`` (``recipe.shape``, ``recipe.dtype``). UserError for an image that cannot be decoded."""
        indices, keys = request
        faults = np.zeros(len(indices), dtype=np.uint8)
        memory = images, np.zeros(len(indices), dtype=np.uint64) if keys is None else keys, faults
        with _one_kernel:
            if self.threads > 1:
                numba.set_num_threads(self.threads)
            self._stage(
                batch_indices=indices,
                metadata=self.loader.reader.metadata,
                storage_state=context.state,
                **{name: memory if name.startswith("memory_") else None for name in self._memory},
            )
        if faults.any():
            bad = int(indices[int(np.argmax(faults))])
            raise UserError(
                f"{self.beton.path}: image number {bad} cannot be decoded: the file is damaged; copy it again, or make "
                "it again with mmtrain data prepare ffcv --force"
            )


def _key(recipe: Recipe) -> tuple[Any, ...]:
    table = None if recipe.table is None else recipe.table.tobytes()
    return recipe.size, recipe.random, recipe.crop_pct, recipe.hflip, table


def _at_most(threads: int) -> int:
    limit = int(vars(numba.config)["NUMBA_NUM_THREADS"])
    if threads > limit:
        _log.warning(
            "data.workers=%d: numba runs at most %d threads here; set NUMBA_NUM_THREADS=%d to have them all",
            threads,
            limit,
            threads,
        )
    return max(1, min(threads, limit))


class Buffers:
    """Arrays for batches that are used again as soon as nobody holds a tensor (or a view of one) made from them.

    Fresh memory costs a page fault every 4 kB, half as much time as filling it. ``pinned``: torch's own cache of pinned
    memory is asked instead, which also waits for copies to the GPU that are under way.
    """

    KEPT = 8

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, pinned: bool = False) -> None:
        self.shape, self.dtype, self.pinned = shape, dtype, pinned
        self._arrays: list[NDArray[Any]] = [np.empty(shape, dtype)]
        self._idle = self._holders()[0]

    def take(self, count: int) -> NDArray[Any]:
        """An array for ``count`` samples, not initialised. The tensor to hand out is ``torch.from_numpy`` of it."""
        if self.pinned:
            like = torch.from_numpy(np.empty(0, self.dtype)).dtype
            return torch.empty((count, *self.shape[1:]), dtype=like, pin_memory=True).numpy()
        if count != self.shape[0]:  # the last batch of an evaluation
            return np.empty((count, *self.shape[1:]), self.dtype)
        with suppress(ValueError):
            return self._arrays[self._holders().index(self._idle)]
        made = np.empty(self.shape, self.dtype)
        if len(self._arrays) < self.KEPT:
            self._arrays.append(made)
        return made

    def _holders(self) -> list[int]:
        return [sys.getrefcount(array) for array in self._arrays]
