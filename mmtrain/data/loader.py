"""Batches of a source in the order of the data clock, for any rank, world size and number of workers.

A worker gets the stream positions of a whole micro-batch and returns it collated, so workers share nothing and hold no
state: the loader can be rebuilt anywhere from the number of samples consumed.
"""

from __future__ import annotations

import multiprocessing.util
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmtrain.data.order import Order, local_positions, mix64
from mmtrain.data.source import Source, Streaming
from mmtrain.errors import UserError

Batch = dict[str, torch.Tensor]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class _Failure:
    """A UserError on its way out of a worker: DataLoader would bury the message in a traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Batches(Dataset):
    """Map-style dataset whose item is a micro-batch: ``__getitems__`` takes an int64 array made by the sampler."""

    def __init__(self, build: Callable[[np.ndarray], Batch]) -> None:
        self.build = build

    def __getitems__(self, numbers: np.ndarray) -> Batch | _Failure:
        try:
            return self.build(numbers)
        except UserError as error:
            return _Failure(str(error))

    def __getitem__(self, number: int) -> Batch | _Failure:
        return self.__getitems__(np.asarray([number], dtype=np.int64))


class _Train:
    """Positions → a training batch."""

    def __init__(self, source: Source, order: Order) -> None:
        self.source, self.order = source, order

    def __call__(self, positions: np.ndarray) -> Batch:
        epochs, indices = self.order.lookup(positions)
        keys = mix64(self.order.seed, epochs, indices)
        batch = dict(self.source.fetch(indices, keys))
        batch["position"] = torch.from_numpy(positions)
        batch["index"] = torch.from_numpy(indices)
        batch["key"] = torch.from_numpy(keys.view(np.int64))
        return batch


class _Evaluate:
    """Sample indices → an evaluation batch."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, indices: np.ndarray) -> Batch:
        batch = dict(self.source.fetch(indices, None))
        batch["index"] = torch.from_numpy(indices)
        return batch


class _Sampler:
    """Re-iterable sampler: yields one int64 array for each micro-batch."""

    def __init__(self, arrays: Callable[[], Iterator[np.ndarray]]) -> None:
        self.arrays = arrays

    def __iter__(self) -> Iterator[np.ndarray]:
        return self.arrays()


def train_batches(
    source: Source,
    *,
    seed: int,
    batch_size: int,
    start: int,
    steps: int,
    rank: int = 0,
    world: int = 1,
    micros: int = 1,
    workers: int = 0,
    window: int = 8,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Micro-batches of ``steps`` optimizer steps from stream position ``start`` (the number of samples consumed).

    ``batch_size`` is the global batch. Yields step 0 micro 0, micro 1, ..., then step 1: each what ``source.fetch``
    gives for ``batch_size / (world * micros)`` samples plus int64 ``position`` (in the stream), ``index`` (of the
    sample) and ``key`` (the uint64 random key's bits). The stream runs on over epoch ends. ``prefetch`` is the number
    of micro-batches each worker keeps ready. Bit-identical for every number of workers.

    Raises UserError for a batch that does not divide and for what the source reports, RuntimeError if a worker dies.
    """
    if start < 0 or steps < 0:
        raise ValueError(f"start and steps are 0 or more, got {start} and {steps}")
    local_positions(start, batch_size, rank, world, 0, micros)  # say what is wrong before any worker starts

    def arrays() -> Iterator[np.ndarray]:
        for step in range(steps):
            for micro in range(micros):
                yield local_positions(start + step * batch_size, batch_size, rank, world, micro, micros)

    order = Order(source.block_sizes, seed, window)
    if isinstance(source, Streaming):
        return source.batches(arrays(), order, workers=workers, prefetch=prefetch, pin_memory=pin_memory)
    return _iterate(_Batches(_Train(source, order)), arrays, workers, prefetch, pin_memory)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Every sample once, in order, without padding: rank r of w takes r, r + w, ... in batches of ``batch_size``.

    The last batch is short, and ranks can differ by one sample, hence by one batch: reduce sums and counts at the end,
    not batch by batch. Adds int64 ``index`` to what ``source.fetch`` gives.
    """
    if batch_size < 1:
        raise UserError(f"the evaluation batch size is 1 or more, got {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"no rank {rank} of {world}")
    length = len(source)

    def arrays() -> Iterator[np.ndarray]:
        for begin in range(rank, length, world * batch_size):
            yield np.arange(begin, min(begin + world * batch_size, length), world, dtype=np.int64)

    if isinstance(source, Streaming):
        return source.batches(arrays(), None, workers=workers, prefetch=prefetch, pin_memory=pin_memory)
    return _iterate(_Batches(_Evaluate(source)), arrays, workers, prefetch, pin_memory)


def _iterate(
    batches: _Batches, arrays: Callable[[], Iterator[np.ndarray]], workers: int, prefetch: int, pin_memory: bool
) -> Iterator[Batch]:
    if workers < 0:
        raise UserError(f"data.workers={workers}: give 0 (load in the training process) or more")
    options: dict[str, Any] = {"prefetch_factor": max(1, prefetch), "worker_init_fn": _start_worker} if workers else {}
    loader = DataLoader(
        batches,
        batch_sampler=_Sampler(arrays),  # type: ignore[arg-type]  # arrays in place of lists of ints
        num_workers=workers,
        collate_fn=_as_is,  # type: ignore[arg-type]  # items are batches already
        pin_memory=pin_memory,
        # DataLoader draws a seed when it starts; from a generator of its own, or it would advance the global one.
        generator=torch.Generator(),
        **options,
    )
    return _run(loader)


def _run(loader: DataLoader) -> Iterator[Batch]:
    iterator = _start(loader)
    # Workers ignore SIGTERM, by which multiprocessing would end them at exit before it waits for them: without this, an
    # exit in the middle of a run would wait for ever.
    stop = multiprocessing.util.Finalize(None, _stop, args=(iterator,), exitpriority=100)
    try:
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if loader.num_workers and _is_death(error):
                    raise RuntimeError(_died(error)) from error
                raise
            if isinstance(batch, _Failure):
                raise UserError(batch.message)
            yield batch
    finally:
        stop()  # now, and not when the last traceback lets go of the iterator


def _start(loader: DataLoader) -> Iterator[Any]:
    """Start the workers, but without the SIGCHLD handler that comes with them.

    It raises wherever the training process happens to be, be it inside a checkpoint or a finalizer that swallows it.
    DataLoader's own check, each 5 s without data, finds a dead worker as well, and in the right place.
    """
    if not loader.num_workers or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    # Workers begin with the signals held back, so that none can hit them before they ignore it (_start_worker).
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if before is not None:  # None: set by C code, and out of reach
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _stop(iterator: Any) -> None:
    """End the workers: politely, then for good."""
    if not hasattr(iterator, "_shutdown_workers"):
        return  # no workers
    workers = list(iterator._workers)
    iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _is_death(error: Exception) -> bool:
    """Did a worker die, or did the source raise this in a worker (then its traceback is in the message)?"""
    if "in DataLoader worker process" in str(error):
        return False
    lost = isinstance(error, OSError | EOFError)  # a tensor's file was to come from a worker that is gone
    return lost or any(sign in str(error) for sign in ("is killed by signal", "exited unexpectedly"))


def _died(error: Exception) -> str:
    return (
        f"a data worker died ({str(error).strip()}). Most often the machine ran out of memory or of shared memory "
        "(/dev/shm): use fewer data.workers, or data.workers=0 to see the error itself"
    )


def _as_is(batch: Batch | _Failure) -> Batch | _Failure:
    return batch


def _start_worker(_: int) -> None:
    """Leave every signal to the training process: it decides when to stop, and stops its workers itself."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    torch.set_num_threads(1)
