"""Batches moved to the device where they are wanted: on a GPU the next one is copied while this one is computed.

Batches of a source in the order of the data clock, for any rank, world size and number of workers.

A worker gets the stream positions of a whole micro-batch and returns it collated, so workers share nothing and hold no
state: the loader can be rebuilt anywhere from the number of samples consumed.
"""

from __future__ import annotations

import multiprocessing.util
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmtrain.data.core.buffers import Mapped, Ring
from mmtrain.data.core.faults import Fault
from mmtrain.data.core.order import Order, local_positions, mix64
from mmtrain.data.core.source import Source, Staged, Streaming
from mmtrain.errors import UserError

Batch = dict[str, torch.Tensor]


def on_device(
    batches: Iterable[Batch], device: torch.device | None, finish: Callable[[Batch], Batch]
) -> Iterator[Batch]:
    """Each batch on ``device`` (None: where it is) and finished there.

    For CUDA both happen on a stream of their own, one batch ahead: give batches in pinned memory.
    """
    if device is None or device.type != "cuda":
        for batch in batches:
            yield finish(batch)
        return
    side = torch.cuda.Stream(device)
    ahead: Batch | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            sent = finish({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
        if ahead is not None:
            yield _handed_over(ahead, side)
        ahead = sent
    if ahead is not None:
        yield _handed_over(ahead, side)


def _handed_over(batch: Batch, side: torch.cuda.Stream) -> Batch:
    """The stream that computes waits for the one that copied, and memory is not used again before it is done."""
    current = torch.cuda.current_stream()
    current.wait_stream(side)
    for tensor in batch.values():
        tensor.record_stream(current)
    return batch


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


#: Times that workers which died are started again, where faults are to be survived.
_RESTARTS = 3

#: Bytes of a tensor that is sent by value.
_SMALL = 1 << 15

OnFault = Callable[[Fault], None]


class _Failure:
    """A UserError on its way out of a worker: DataLoader would bury the message in a traceback."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Made:
    """A batch on its way out of a worker, with what could not be used for it."""

    def __init__(self, batch: Batch, faults: list[Fault]) -> None:
        self.batch, self.faults = batch, faults

    def pin_memory(self) -> _Made:
        """DataLoader asks for this."""
        return _Made({name: tensor.pin_memory() for name, tensor in self.batch.items()}, self.faults)

    def __getstate__(self) -> tuple[dict[str, Any], list[Fault]]:
        """Small tensors travel by value: a file of shared memory for each would take longer than the batch."""
        small = {n: t.numpy() for n, t in self.batch.items() if t.nbytes <= _SMALL and t.dtype != torch.bfloat16}
        return {**self.batch, **small}, self.faults

    def __setstate__(self, state: tuple[dict[str, Any], list[Fault]]) -> None:
        batch, self.faults = state
        self.batch = {n: torch.from_numpy(t) if isinstance(t, np.ndarray) else t for n, t in batch.items()}


class _Died(RuntimeError):
    """A worker is gone."""


class _Batches(Dataset):
    """Map-style dataset whose item is a micro-batch: ``__getitems__`` takes an int64 array made by the sampler."""

    def __init__(self, source: Source, build: Callable[[np.ndarray], Batch]) -> None:
        self.source, self.build = source, build

    def __getitems__(self, numbers: np.ndarray) -> _Made | _Failure:
        try:
            batch = self.build(numbers)
        except UserError as error:
            return _Failure(str(error))
        take = getattr(self.source, "take_faults", None)
        return _Made(batch, take() if take is not None else [])

    def __getitem__(self, number: int) -> _Made | _Failure:
        return self.__getitems__(np.asarray([number], dtype=np.int64))


class _Load:
    """What the source gives for samples, as far as that is a worker's business."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.staged = source if isinstance(source, Staged) else None  # the question takes longer than a small batch

    def __call__(self, indices: np.ndarray, keys: np.ndarray | None, ring: Ring | None) -> Batch:
        if self.staged is None:
            return dict(self.source.fetch(indices, keys))
        if ring is None:
            return dict(self.staged.load(indices, keys))
        batch = self.staged.load(indices, keys, ring.empty)
        return {**batch, **{name: ring.place(batch[name]) for name in self.staged.moved if len(batch[name])}}


def _finish(source: Source) -> Callable[[Batch], Batch]:
    return source.finish if isinstance(source, Staged) else _as_it_is


def _as_it_is(batch: Batch) -> Batch:
    return batch


class _Train:
    """Positions → a training batch."""

    def __init__(self, source: Source, order: Order) -> None:
        self.load, self.order = _Load(source), order
        self.ahead: Callable[[list[int]], None] | None = getattr(source, "ahead", None)

    def __call__(self, ring: Ring | None, positions: np.ndarray) -> Batch:
        if self.ahead is not None:
            self.ahead(self.order.coming(int(positions[-1])))
        epochs, indices = self.order.lookup(positions)
        # a batch seldom reaches over the end of an epoch, and one number is hashed faster than many
        epoch = int(epochs[0]) if len(epochs) and epochs[0] == epochs[-1] else epochs
        keys = mix64(self.order.seed, epoch, indices)
        batch = self.load(indices, keys, ring)
        batch["position"] = torch.from_numpy(positions)
        batch["index"] = torch.from_numpy(indices)
        batch["key"] = torch.from_numpy(keys.view(np.int64))
        return batch


class _Evaluate:
    """Sample indices → an evaluation batch."""

    def __init__(self, source: Source) -> None:
        self.load = _Load(source)

    def __call__(self, ring: Ring | None, indices: np.ndarray) -> Batch:
        batch = self.load(indices, None, ring)
        kept = batch.pop("kept", None)  # not all of them, where faults are left out
        batch["index"] = torch.from_numpy(indices) if kept is None else torch.from_numpy(indices)[kept]
        return batch


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
    device: torch.device | None = None,
    on_fault: OnFault | None = None,
) -> Iterator[Batch]:
    """Micro-batches of ``steps`` optimizer steps from stream position ``start`` (the number of samples consumed).

    ``batch_size`` is the global batch. Yields step 0 micro 0, micro 1, ..., then step 1: each what ``source.fetch``
    gives for ``batch_size / (world * micros)`` samples plus int64 ``position`` (in the stream), ``index`` (of the
    sample) and ``key`` (the uint64 random key's bits). The stream runs on over epoch ends. ``prefetch`` is the number
    of micro-batches each worker keeps ready; ``device`` is where they come. Bit-identical for every number of workers.

    ``on_fault`` is told of every sample that could not be used. With it workers that die are started again; without it
    that is a RuntimeError. Raises UserError for a batch that does not divide and for what the source reports.
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
        return _streamed(source, arrays(), order, workers, prefetch, device)
    return _iterate(source, _Train(source, order), arrays, workers, prefetch, device, on_fault)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    device: torch.device | None = None,
    on_fault: OnFault | None = None,
) -> Iterator[Batch]:
    """Every sample once, in order, without padding: rank r of w takes r, r + w, ... in batches of ``batch_size``.

    The last batch is short, and ranks can differ by one sample, hence by one batch: reduce sums and counts at the end,
    not batch by batch. Adds int64 ``index`` to what ``source.fetch`` gives. Samples that cannot be used are missing
    where the source leaves faults out; a batch without any is left out. ``device``, ``on_fault``: as in training.
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
        return _streamed(source, arrays(), None, workers, prefetch, device)
    return _iterate(source, _Evaluate(source), arrays, workers, prefetch, device, on_fault)


def _streamed(
    source: Streaming,
    numbers: Iterator[np.ndarray],
    order: Order | None,
    workers: int,
    prefetch: int,
    device: torch.device | None,
) -> Iterator[Batch]:
    """The batches of a source that makes them itself."""
    pinned = device is not None and device.type == "cuda"
    made = source.batches(numbers, order, workers=workers, prefetch=prefetch, pin_memory=pinned)
    return on_device(made, device, _as_it_is)


def _iterate(
    source: Source,
    build: Callable[[Ring | None, np.ndarray], Batch],
    arrays: Callable[[], Iterator[np.ndarray]],
    workers: int,
    prefetch: int,
    device: torch.device | None,
    on_fault: OnFault | None,
) -> Iterator[Batch]:
    if workers < 0:
        raise UserError(f"data.workers={workers}: give 0 (load in the training process) or more")
    # a worker has so many batches under way, and one more is being read
    slots = max(1, prefetch) + 2
    batches = _Batches(source, partial(build, Ring(slots) if workers else None))
    for fault in getattr(source, "take_faults", list)():  # those found when the source was opened
        if on_fault is not None:
            on_fault(fault)

    pinned = device is not None and device.type == "cuda"

    def begin(done: int) -> Iterator[_Made | _Failure]:
        rest = islice(arrays(), done, None)
        if not workers:
            return _here(batches, rest, pinned)
        loader = DataLoader(
            batches,
            batch_sampler=rest,  # type: ignore[arg-type]  # arrays, not lists of ints
            num_workers=workers,
            worker_init_fn=_start_worker,
            collate_fn=_as_is,  # type: ignore[arg-type]  # items are batches already
            pin_memory=pinned,
            prefetch_factor=max(1, prefetch),
            # DataLoader draws a seed when it starts; from a generator of its own, or it would advance the global one.
            generator=torch.Generator(),
        )
        return _mapped(_run(loader), source.moved, slots * workers) if isinstance(source, Staged) else _run(loader)

    return on_device(_survive(begin, on_fault), device, _finish(source))


def _survive(begin: Callable[[int], Iterator[_Made | _Failure]], on_fault: OnFault | None) -> Iterator[Batch]:
    """The batches of ``begin(0)``; when its workers die, those of ``begin(batches so far)``, a few times."""
    done = restarts = 0
    while True:
        try:
            with closing(begin(done)) as all_made:  # type: ignore[type-var]
                for made in all_made:
                    if isinstance(made, _Failure):
                        raise UserError(made.message)
                    done += 1
                    for fault in made.faults:
                        if on_fault is not None:
                            on_fault(fault)
                    if made.batch["index"].shape[0]:
                        yield made.batch
            return
        except _Died as error:
            restarts += 1
            if on_fault is None or restarts > _RESTARTS:
                raise
            on_fault(Fault(-1, f"data worker, time {restarts}", f"it died and was started again: {error}", samples=0))


def _here(batches: _Batches, arrays: Iterator[np.ndarray], pinned: bool) -> Iterator[_Made | _Failure]:
    """Without workers there is nothing left for DataLoader to do, and what it does takes as long as a small batch."""
    for numbers in arrays:
        made = batches.__getitems__(numbers)
        yield made.pin_memory() if pinned and isinstance(made, _Made) else made


def _mapped(all_made: Iterator[_Made | _Failure], moved: Sequence[str], slots: int) -> Iterator[_Made | _Failure]:
    """The same, with the memory in which they came kept mapped."""
    mapped = Mapped(slots)
    with closing(all_made):  # type: ignore[type-var]
        for made in all_made:
            if isinstance(made, _Made):
                for name in moved:
                    mapped.keep(made.batch[name])
            yield made


def _run(loader: DataLoader) -> Iterator[_Made | _Failure]:
    iterator = _start(loader)
    # Workers ignore SIGTERM, by which multiprocessing would end them at exit before it waits for them: without this, an
    # exit in the middle of a run would wait for ever.
    stop = multiprocessing.util.Finalize(None, _stop, args=(iterator,), exitpriority=100)
    try:
        while True:
            try:
                made = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if loader.num_workers and _is_death(error):
                    raise _Died(_died(error)) from error
                raise
            yield made
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


def _as_is(made: _Made | _Failure) -> _Made | _Failure:
    return made


def _start_worker(_: int) -> None:
    """Leave every signal to the training process: it decides when to stop, and stops its workers itself."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    torch.set_num_threads(1)
