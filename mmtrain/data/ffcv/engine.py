"""A beton, its compiled decoder and the memory it is read through: batches of given samples and keys.

Of FFCV this takes the library that decodes and resizes, and the process cache that reads pages ahead. Its Loader is
left aside: it knows neither keys nor a stream without end, waits for ever when its thread fails, hands out memory that
it writes again, and alters the array types that numba shares, so that a second Loader may compile without end.

A thread that keeps batches ready: numba leaves Python's lock alone while it decodes, so nothing need be forked.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import numba
import numpy as np
from ffcv.memory_managers import ProcessCacheManager
from ffcv.reader import Reader
from numpy.typing import NDArray

from mmtrain.data.ffcv.augment import Recipe
from mmtrain.data.ffcv.decoding import compile_decoder
from mmtrain.data.ffcv.format import Beton
from mmtrain.errors import UserError

Indices = NDArray[np.int64]
Keys = NDArray[np.uint64]
#: Samples and their keys (None in evaluation).
Request = tuple[Indices, Keys | None]

#: numba's fallback threading layer ends the process when two threads run parallel code at once.
_one_kernel = threading.Lock()
#: Once in a process, since compiling takes seconds.
_decoders: dict[tuple[Any, ...], Callable[..., None]] = {}
logger = logging.getLogger("mmtrain")


class Engine:
    """Batches of ``recipe`` from a beton. ``threads`` and ``os_cache`` never change what comes out.

    ``os_cache``: map the file and leave it to the system what stays in memory; else read the pages of the requests that
    are ``opened`` together, ahead of their use, and drop each page when it was used for the last time.
    """

    def __init__(self, beton: Beton, recipe: Recipe, threads: int, os_cache: bool) -> None:
        self.beton, self.recipe, self.os_cache = beton, recipe, os_cache
        self.threads = _at_most(threads)
        table = None if recipe.table is None else recipe.table.tobytes()
        key = (recipe.size, recipe.random, recipe.crop_pct, recipe.hflip, table, os_cache, self.threads > 1)
        if key not in _decoders:
            _decoders[key] = compile_decoder(recipe, os_cache, self.threads > 1)
        self._decode = _decoders[key]
        self._pages = None if os_cache else ProcessCacheManager(Reader(str(beton.path)))

    @contextmanager
    def opened(self, requests: Sequence[Request]) -> Iterator[Callable[[int], Any]]:
        """``state(number)``: the memory that request ``number`` is decoded from; with ``os_cache`` that of any."""
        try:
            if self.beton.path.stat().st_size != self.beton.file_size:
                raise UserError(f"{self.beton.path}: the file has changed after the run started; start again")
            mapped = np.memmap(self.beton.path, np.uint8, mode="r") if self.os_cache else None
        except OSError as error:
            raise UserError(f"{self.beton.path}: cannot be read any more ({error.strerror})") from error
        if mapped is not None:
            plain = np.asarray(mapped)
            yield lambda number: plain
            return
        assert self._pages is not None
        context = self._pages.schedule_epoch([indices for indices, _ in requests])
        shift = self.beton.page_size.bit_length() - 1

        def state(number: int) -> Any:
            context.start_batch(number)
            return context.memory, context.page_to_slot, shift

        context.__enter__()
        try:
            yield state
        finally:
            context.__exit__(None, None, None)
            for reader in context.executor.threads:
                reader.join()

    def run(self, state: Any, request: Request, images: NDArray[Any]) -> None:
        """Fill ``images`` (``recipe.shape``, ``recipe.dtype``). UserError for an image that cannot be decoded."""
        indices, keys = request
        faults = np.zeros(len(indices), dtype=np.uint8)
        # One thread takes no lock: a loader process may have been forked while another thread held it.
        with _one_kernel if self.threads > 1 else nullcontext():
            if self.threads > 1:
                numba.set_num_threads(self.threads)
            self._decode(
                indices, _no_keys(len(indices)) if keys is None else keys, images, faults, self.beton.rows, state
            )
        if faults.any():
            bad = int(indices[int(np.argmax(faults))])
            raise UserError(
                f"{self.beton.path}: image number {bad} cannot be decoded: the file is damaged; copy it again, or make "
                "it again with mmtrain data prepare ffcv --force"
            )


def _no_keys(count: int) -> Keys:
    return np.zeros(count, dtype=np.uint64)


def _at_most(threads: int) -> int:
    limit = int(vars(numba.config)["NUMBA_NUM_THREADS"])
    if threads > limit:
        logger.warning(
            "data.workers=%d: numba runs at most %d threads here; set NUMBA_NUM_THREADS=%d to have them all",
            threads,
            limit,
            threads,
        )
    return max(1, min(threads, limit))


_END = object()


class Stream:
    """Iterator over what ``finish(request, about, images)`` makes of each request, ``ahead`` of them in advance.

    ``segment``: requests whose pages are read together where the engine has no ``os_cache``. What fails in the thread
    is raised by ``next``. ``close`` (or the end of the process) stops the thread, whatever it is doing.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Iterator[tuple[Request, Any]],
        take: Callable[[int], Any],
        finish: Callable[[Request, Any, Any], Any],
        *,
        ahead: int,
        segment: int,
    ) -> None:
        self._engine, self._requests, self._take, self._finish = engine, requests, take, finish
        self._segment = segment
        self._ready: queue.Queue[Any] = queue.Queue(max(1, ahead))
        self._stop = threading.Event()
        # daemon: the interpreter waits for other threads before it calls what atexit knows
        self._thread = threading.Thread(target=self._work, name="ffcv", daemon=True)
        atexit.register(self.close)
        self._thread.start()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._stop.is_set():
            raise StopIteration
        item = self._ready.get()
        if item is _END:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        return item

    def close(self) -> None:
        """Stop the thread and wait for it: at most for the batch it is at."""
        self._stop.set()
        self._thread.join()
        atexit.unregister(self.close)

    def _work(self) -> None:
        try:
            for batch in self._batches():
                if not self._put(batch):
                    return
            self._put(_END)
        except BaseException as error:  # whatever it is, the one who waits must hear of it
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def _batches(self) -> Iterator[Any]:
        if self._engine.os_cache:
            with self._engine.opened([]) as state:
                for request, about in self._requests:
                    yield self._one(state(0), request, about)
            return
        while segment := list(islice(self._requests, self._segment)):
            with self._engine.opened([request for request, _ in segment]) as state:
                for number, (request, about) in enumerate(segment):
                    yield self._one(state(number), request, about)

    def _one(self, state: Any, request: Request, about: Any) -> Any:
        images = self._take(len(request[0]))
        self._engine.run(state, request, images)
        return self._finish(request, about, images)
