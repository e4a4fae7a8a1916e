"""Micro-batches loaded by worker processes (torch's DataLoader), in a given order.

A worker receives the sample numbers of a micro-batch and returns the collated micro-batch, so workers share nothing and
have no state. Large tensors are sent in shared memory that is reused, because the first write to a new memory page
costs more than the write itself. Workers that die are restarted if faults may be skipped.
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

#: Maximum number of restarts of workers that died.
_RESTARTS = 3
#: Largest tensor, in bytes, that is sent by value instead of in shared memory.
_SMALL = 1 << 15
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Ring:
    """Ring buffer of shared memory in which one worker sends its large tensors.

    The object is created before the workers, and each worker allocates its own slots. A worker has only a few batches
    in transit, so the training process has finished with a slot before the slot is reused.
    """

    def __init__(self, slots: int) -> None:
        self.slots: list[Tensor | None] = [None] * slots
        self.turn = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in the next slot. The previous content of the slot is lost."""
        size = prod(shape) * dtype.itemsize
        slot = self.slots[self.turn]
        if slot is None or slot.numel() < size:
            slot = self.slots[self.turn] = torch.empty(size, dtype=torch.uint8).share_memory_()
        self.turn = (self.turn + 1) % len(self.slots)
        return slot[:size].view(dtype).view(*shape)

    def place(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` itself if it was allocated with ``empty``, otherwise a copy in the next slot."""
        address = tensor.untyped_storage().data_ptr()
        if any(slot is not None and slot.untyped_storage().data_ptr() == address for slot in self.slots):
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


#: Function that loads the batch of an array of numbers, with its large tensors in the ring (None: in any memory).
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
    """Yield ``make(numbers, ring)`` for each array of ``arrays()``, in order. Empty batches are not yielded.

    Args:
        workers: worker processes (0: load in this process).
        prefetch: batches that each worker keeps ready.
        pinned: copy the batches to pinned memory.
        on_fault: called for each fault of the source. If given, workers that die are restarted; otherwise their death
            raises a UserError.

    Raises:
        UserError: as raised by the source.
    """
    slots = prefetch + 2  # ``prefetch`` batches in transit, one being loaded and one being read
    dataset = _Batches(source, make, Ring(slots) if workers else None)
    for fault in getattr(source, "take_faults", list)():  # faults found when the source was opened
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
            # DataLoader draws a seed when it starts. A separate generator keeps the global one unchanged.
            generator=torch.Generator(),
        )
        received = _received(loader)
        return _kept_mapped(received, source.moved, slots * workers) if isinstance(source, Staged) else received

    return _survive(begin, on_fault)


class _Made:
    """A batch sent by a worker, with the faults found while it was loaded."""

    def __init__(self, batch: Batch, faults: list[Fault]) -> None:
        self.batch, self.faults = batch, faults

    def pin_memory(self) -> _Made:
        """Return a copy in pinned memory; called by DataLoader."""
        return _Made({name: tensor.pin_memory() for name, tensor in self.batch.items()}, self.faults)

    def __getstate__(self) -> tuple[dict[str, Any], list[Fault]]:
        """Pickle small tensors by value: a shared memory file for each would take longer than loading the batch."""
        small = {n: t.numpy() for n, t in self.batch.items() if t.nbytes <= _SMALL and t.dtype != torch.bfloat16}
        return {**self.batch, **small}, self.faults

    def __setstate__(self, state: tuple[dict[str, Any], list[Fault]]) -> None:
        batch, self.faults = state
        self.batch = {n: torch.from_numpy(t) if isinstance(t, np.ndarray) else t for n, t in batch.items()}


class _Batches(Dataset):
    """Map-style dataset whose items are micro-batches: ``__getitems__`` takes an int64 array from the sampler."""

    def __init__(self, source: Source, make: Make, ring: Ring | None) -> None:
        self.make, self.ring = make, ring
        self.take_faults: Callable[[], list[Fault]] = getattr(source, "take_faults", list)

    def __getitems__(self, numbers: np.ndarray) -> _Made | UserError:
        try:
            return _Made(self.make(numbers, self.ring), self.take_faults())
        except UserError as error:  # returned, because DataLoader would hide the message in a traceback
            return UserError(str(error))

    def __getitem__(self, number: int) -> _Made | UserError:
        return self.__getitems__(np.asarray([number], dtype=np.int64))


class _WorkerDied(UserError, RuntimeError):
    """A worker process died. A UserError, because a traceback of the training process would not show the reason."""


def _survive(begin: Callable[[int], Iterator[_Made | UserError]], on_fault: OnFault | None) -> Iterator[Batch]:
    """Yield the batches of ``begin(0)``. If workers die, continue with ``begin(done)``, at most ``_RESTARTS`` times.

    Args:
        begin: function that starts the workers after a number of batches that are done.
        on_fault: called for each fault and each restart. None: a dead worker raises _WorkerDied.
    """
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
            on_fault(Fault(-1, f"data worker, restart {restarts}", f"it died and was restarted: {error}", samples=0))


def _here(dataset: _Batches, arrays: Iterator[np.ndarray], pinned: bool) -> Iterator[_Made | UserError]:
    """Load batches in this process. DataLoader is not used, because its overhead is as large as a small batch."""
    for numbers in arrays:
        made = dataset.__getitems__(numbers)
        yield made.pin_memory() if pinned and isinstance(made, _Made) else made


def _received(loader: DataLoader) -> Iterator[_Made | UserError]:
    """Start the workers and yield their batches. Raises _WorkerDied."""
    iterator = _start(loader)
    # At exit, multiprocessing sends SIGTERM to the workers and waits for them. Workers ignore SIGTERM, so without this
    # finalizer an exit in the middle of a run would wait forever.
    stop = multiprocessing.util.Finalize(None, _stop, args=(iterator,), exitpriority=100)
    try:
        while True:
            try:
                made = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                text = str(error).strip()
                # OSError, EOFError: the shared memory of a tensor was lost with its worker
                died = isinstance(error, OSError | EOFError) or "is killed by signal" in text
                if "in DataLoader worker process" in text or not (died or "exited unexpectedly" in text):
                    raise  # an exception of the source in a worker; the message contains its traceback
                raise _WorkerDied(
                    f"a data worker died ({text}). The usual cause is that the machine ran out of memory or of shared "
                    "memory (/dev/shm). Reduce data.workers, or set data.workers=0 to see the original error"
                ) from error
            yield made
    finally:
        stop()  # stop now: a traceback may keep the iterator alive for longer


def _kept_mapped(all_made: Iterator[_Made | UserError], moved: Sequence[str], most: int) -> Iterator[_Made | UserError]:
    """Yield ``all_made`` unchanged, but keep the last ``most`` slots of shared memory mapped.

    torch reuses the mapping of a storage that is still referenced, which saves mapping the slot again.
    """
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
    """Start the workers, but without DataLoader's SIGCHLD handler.

    That handler raises at an arbitrary point of the training process, for example while it saves a checkpoint, or
    inside a finalizer that swallows the exception. DataLoader also checks for dead workers after each 5 s without
    data, and raises that error where the batch is read.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    # Workers start with these signals blocked, until _start_worker has set them to be ignored.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if before is not None:  # None: the handler was set by C code and cannot be restored
        signal.signal(signal.SIGCHLD, before)
    return iterator


def _start_worker(_: int) -> None:
    """Ignore signals in a worker. The training process decides when to stop, and stops its workers itself."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    torch.set_num_threads(1)


def _stop(iterator: Any) -> None:
    """Shut the workers down, and kill those that are still alive."""
    workers = list(iterator._workers)
    iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _as_is(made: Any) -> Any:
    return made
