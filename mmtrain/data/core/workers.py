"""Micro-batches made by worker processes (torch's DataLoader), in the order asked for.

A worker gets the numbers of a whole micro-batch and returns it collated, so workers share nothing and hold no state.
Large tensors travel in shared memory that is used again, because fresh pages would cost more than what is written to
them. A worker that dies is started again where faults are to be survived.
"""

from __future__ import annotations

import multiprocessing.util
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmtrain.data.core.source import Batch, Fault, OnFault, Source, Staged
from mmtrain.errors import UserError

#: Restarts of workers that died, where faults are to be survived.
_RESTARTS = 3
#: Bytes of a tensor that is sent by value.
_SMALL = 1 << 15
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Ring:
    """The slots of shared memory that one worker sends its large tensors in, by turns.

    Made before the workers are, filled in each. A worker has only a few batches on their way; the training process is
    done with a slot before its turn comes again.
    """

    def __init__(self, slots: int) -> None:
        self.slots: list[Tensor | None] = [None] * slots
        self.turn = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor in the next slot, whose content is lost."""
        size = prod(shape) * dtype.itemsize
        slot = self.slots[self.turn]
        if slot is None or slot.numel() < size:
            slot = self.slots[self.turn] = torch.empty(size, dtype=torch.uint8).share_memory_()
        self.turn = (self.turn + 1) % len(self.slots)
        return slot[:size].view(dtype).view(*shape)

    def place(self, tensor: Tensor) -> Tensor:
        """``tensor`` itself where it is from ``empty``, else a copy in the next slot."""
        where = tensor.untyped_storage().data_ptr()
        if any(slot is not None and slot.untyped_storage().data_ptr() == where for slot in self.slots):
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


#: Makes the batch of an array of numbers, its large tensors in the ring (None: where it likes).
Make = Callable[[np.ndarray, Ring | None], Batch]


def made_batches(
    source: Source,
    make: Make,
    arrays: Callable[[], Iterator[np.ndarray]],
    *,
    workers: int,
    prefetch: int,
    pinned: bool,
    on_fault: OnFault | None,
) -> Iterator[Batch]:
    """``make`` of each of ``arrays()``, in order, without those that hold no sample; 0 workers: in this process.

    ``on_fault`` is told of the source's faults. With it workers that die are started again; without it their death is
    a UserError, as is what the source reports.
    """
    slots = prefetch + 2  # a worker has ``prefetch`` batches on their way, makes one, and one is being read
    dataset = _Batches(source, make, Ring(slots) if workers else None)
    for fault in getattr(source, "take_faults", list)():  # those found when the source was opened
        if on_fault is not None:
            on_fault(fault)

    def begin(done: int) -> Iterator[_Made | UserError]:
        rest = islice(arrays(), done, None)
        if not workers:
            return _here(dataset, rest, pinned)
        loader = DataLoader(
            dataset,
            batch_sampler=rest,  # type: ignore[arg-type]  # arrays, not lists of ints
            num_workers=workers,
            worker_init_fn=_start_worker,
            collate_fn=_as_is,  # items are batches already
            pin_memory=pinned,
            prefetch_factor=prefetch,
            # DataLoader draws a seed when it starts; from a generator of its own, or it would advance the global one.
            generator=torch.Generator(),
        )
        received = _received(loader)
        return _kept_mapped(received, source.moved, slots * workers) if isinstance(source, Staged) else received

    return _survive(begin, on_fault)


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


class _Batches(Dataset):
    """Map-style dataset whose item is a micro-batch: ``__getitems__`` takes an int64 array made by the sampler."""

    def __init__(self, source: Source, make: Make, ring: Ring | None) -> None:
        self.make, self.ring = make, ring
        self.take_faults: Callable[[], list[Fault]] = getattr(source, "take_faults", list)

    def __getitems__(self, numbers: np.ndarray) -> _Made | UserError:
        try:
            return _Made(self.make(numbers, self.ring), self.take_faults())
        except UserError as error:  # returned, because DataLoader would bury the message in a traceback
            return UserError(str(error))

    def __getitem__(self, number: int) -> _Made | UserError:
        return self.__getitems__(np.asarray([number], dtype=np.int64))


class _WorkerDied(UserError, RuntimeError):
    """Its message says all: a traceback of the training process would not tell why a worker was killed."""


def _survive(begin: Callable[[int], Iterator[_Made | UserError]], on_fault: OnFault | None) -> Iterator[Batch]:
    """The batches of ``begin(0)``; when its workers die, those of ``begin(batches so far)``, a few times."""
    done = restarts = 0
    while True:
        try:
            with closing(begin(done)) as all_made:  # type: ignore[type-var]
                for made in all_made:
                    if isinstance(made, UserError):
                        raise made
                    done += 1
                    for fault in made.faults:
                        if on_fault is not None:
                            on_fault(fault)
                    if made.batch["index"].shape[0]:
                        yield made.batch
            return
        except _WorkerDied as error:
            restarts += 1
            if on_fault is None or restarts > _RESTARTS:
                raise
            on_fault(Fault(-1, f"data worker, time {restarts}", f"it died and was started again: {error}", samples=0))


def _here(dataset: _Batches, arrays: Iterator[np.ndarray], pinned: bool) -> Iterator[_Made | UserError]:
    """Without workers there is nothing left for DataLoader to do, and what it does takes as long as a small batch."""
    for numbers in arrays:
        made = dataset.__getitems__(numbers)
        yield made.pin_memory() if pinned and isinstance(made, _Made) else made


def _received(loader: DataLoader) -> Iterator[_Made | UserError]:
    """What the workers send. Raises _WorkerDied."""
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
                text = str(error).strip()
                # OSError, EOFError: a tensor's file was to come from a worker that is gone
                died = isinstance(error, OSError | EOFError) or "is killed by signal" in text
                if "in DataLoader worker process" in text or not (died or "exited unexpectedly" in text):
                    raise  # by the source, in a worker: its traceback is in the message
                raise _WorkerDied(
                    f"a data worker died ({text}). Most often the machine ran out of memory or of shared memory "
                    "(/dev/shm): use fewer data.workers, or data.workers=0 to see the error itself"
                ) from error
            yield made
    finally:
        stop()  # now, and not when the last traceback lets go of the iterator


def _kept_mapped(all_made: Iterator[_Made | UserError], moved: Sequence[str], most: int) -> Iterator[_Made | UserError]:
    """The same, while the last ``most`` slots stay mapped: torch finds a storage again as long as it lives."""
    storages: OrderedDict[int, torch.UntypedStorage] = OrderedDict()
    with closing(all_made):  # type: ignore[type-var]
        for made in all_made:
            if isinstance(made, _Made):
                for storage in (made.batch[name].untyped_storage() for name in moved):
                    storages[storage.data_ptr()] = storage
                    storages.move_to_end(storage.data_ptr())
            while len(storages) > most:
                storages.popitem(last=False)
            yield made


def _start(loader: DataLoader) -> Iterator[Any]:
    """Start the workers, but without the SIGCHLD handler that comes with them.

    It raises wherever the training process happens to be, be it inside a checkpoint or a finalizer that swallows it.
    DataLoader's own check, each 5 s without data, finds a dead worker as well, and in the right place.
    """
    if threading.current_thread() is not threading.main_thread():
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


def _start_worker(_: int) -> None:
    """Leave every signal to the training process: it decides when to stop, and stops its workers itself."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    torch.set_num_threads(1)


def _stop(iterator: Any) -> None:
    """End the workers: politely, then for good."""
    workers = list(iterator._workers)
    iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _as_is(made: Any) -> Any:
    return made
