"""End a run that hangs, with a message that names the missing ranks.

A collective that waits for a stuck, stopped or dead rank blocks in C++, often forever. Each rank therefore runs two
additional threads. The *publisher* publishes the position of the main thread about once a second and reads the status
of other ranks. The *monitor* measures the time since the main thread's last :meth:`Watchdog.beat`. After the timeout it
names the missing ranks, dumps all stacks and the flight recorder, and ends the process with :data:`EXIT_HANG`.

Two threads are needed because no read from a TCPStore is safe if its host is stopped: in torch 2.13, ``get``,
``check``, ``multi_get`` and even the constructor ignore their timeout and block forever. They release the GIL, so only
the publisher blocks, and the monitor notices that.

Rank 0 reads all statuses, decides for all ranks and publishes the reason for the end. The other ranks read only rank
0's status and the reason, so the traffic grows linearly with the number of ranks. Another rank decides alone if the
store or rank 0 does not respond. Clocks of different hosts are never compared: a rank is silent if its status does not
change any more. A rank whose main thread never releases the GIL is silent too; the launcher has to kill it.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from itertools import count
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from mmtrain.log import logger
from mmtrain.parallel.rank_status import Position, Status, describe_missing
from mmtrain.parallel.ranks import Ranks, dump_flight_recorder, is_collective_error

#: Exit status of a rank that the watchdog ended: EX_TEMPFAIL of sysexits.h ("try again later").
EXIT_HANG = 75

#: A rank is silent if its status has not changed for this many ticks (a tick is 1 s, or less for short timeouts).
_SILENT = 4
#: Ticks that a process waits after publishing the reason, since it may host the store that the others read.
_LINGER = 3
#: Ticks after the timeout at which a rank starts to read all statuses, and at which it decides if rank 0 has not.
_READ_ALL, _DECIDE = 3, 3 + _SILENT + 2
#: Maximum seconds for the message and the dumps. A disk that hangs must not keep the process alive.
_DUMP_SECONDS = 30.0

_instances = count()


class Watchdog:
    """Ends this process if a rank of the run does not beat for too long. A context manager, used on all ranks.

    Args:
        start_timeout: maximum seconds between two beats of a rank before :meth:`first_step_done`.
        step_timeout: maximum seconds between two beats afterwards.
        dump_folder: receives the stacks of all threads (``hang_rank00000.txt`` of rank 0) and the flight recorder.
    """

    def __init__(self, ranks: Ranks, start_timeout: float, step_timeout: float, dump_folder: Path) -> None:
        self.ranks, self.dump_folder = ranks, dump_folder
        self._limit, self._step_timeout = start_timeout, step_timeout
        self._tick = min(1.0, start_timeout / 8, step_timeout / 8)
        self._who, self._left = f"{socket.gethostname()}, pid {os.getpid()}", ""
        self._position = Position(0, 0, 0, "start")
        # running time of this process in seconds: now, at the last beat, at the last response of the store
        self._clock = self._beat_at = self._heard_at = 0.0
        # seconds since the timeout (negative before it); ticks for which rank 0 has seen another rank late
        self._late, self._others_late = -start_timeout, 0
        # by rank: its packed status, and self._clock at the last change of it
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._read_all = ranks.main
        self._described = False
        self._reason = ""
        self._ending, self._leaving, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._monitor = threading.Thread(target=self._monitoring, name="watchdog-monitor", daemon=True)
        self._publisher = threading.Thread(target=self._publishing, name="watchdog-publisher", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.ranks.world > 1:
            self._prefix = f"watchdog/{next(_instances)}/"
            self._monitor.start()
            self._publisher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.ranks.world == 1:
            return
        if error is not None and is_collective_error(error) and not self._described:
            # The watchdog of another rank may have ended its process. Wait for its reason, which is the better message.
            self._closed.wait(_LINGER * self._tick)
        self._left = "has finished" if error is None else f"left after {type(error).__name__}: {str(error)[:400]}"
        self._leaving.set()
        self._monitor.join()  # does not return if the monitor ends the process
        if self.ranks.main:
            # The host of the store leaves last. Otherwise torch reports errors in the publishers of the others.
            end = time.monotonic() + _LINGER * self._tick
            gone = self._silent()  # killed ranks never publish that they leave
            while time.monotonic() < end and not all(
                rank in gone or (s and s.left) for rank, s in self._statuses().items()
            ):
                time.sleep(0.02)
        self._closed.set()
        self._publisher.join(_LINGER * self._tick)

    def beat(self, step: int, phase: str) -> None:
        """Record that the main thread reached ``phase`` of ``step``.

        All ranks must go through the same phases. Call it repeatedly during a long phase.
        """
        self._position = self._position.next(step, phase)

    def first_step_done(self) -> None:
        """Apply ``step_timeout`` from now on, since kernels are compiled and data is open. Counts as a beat."""
        self.beat(self._position.step, self._position.phase)
        self._limit = self._step_timeout

    def describe(self) -> str:
        """Describe the missing ranks and their last positions, after a collective raised an error.

        Takes several ticks, until a rank that has just died counts as silent.
        """
        if self.ranks.world == 1:
            return "there is no other rank"
        self._read_all = self._described = True
        for _ in range(_SILENT + 3):
            self._closed.wait(self._tick)
            if self._silent():
                break
        if self._ending.is_set():
            self._monitor.join()  # the monitor ends the process
        return self._describe_missing()

    # ------------------------------------------------------------------ the monitor

    def _monitoring(self) -> None:
        """Check at every tick whether the run hangs. Body of the monitor thread."""
        before, position = time.monotonic(), self._position
        while not self._leaving.wait(self._tick):
            now = time.monotonic()
            # Slurm suspends a job with SIGSTOP. The time that this process was stopped must not count.
            self._clock += min(now - before, 3 * self._tick)
            before = now
            limit = self._limit  # read before the position, since first_step_done beats before it shortens the limit
            if self._position is not position:
                position, self._beat_at = self._position, self._clock
            self._late = self._clock - self._beat_at - limit
            if self._reason:
                self._end(self._reason)
            elif self._should_end():
                self._end(self._message())

    def _should_end(self) -> bool:
        """Decide whether this process ends the run now."""
        if self.ranks.main:
            # Require several ticks: a status may be a tick old, and the rank may have continued.
            late = any(raw.startswith(b"!") for raw, _ in list(self._seen.values()))
            self._others_late = self._others_late + 1 if late else 0
            return self._late > 0 or self._others_late > 2
        if self._late > _READ_ALL * self._tick:
            self._read_all = True
        return self._late > (0 if self._store_silent() else _DECIDE * self._tick)

    def _store_silent(self) -> bool:
        """Return whether the store does not respond."""
        return self._clock - self._heard_at > _SILENT * self._tick

    def _silent(self) -> dict[int, float]:
        """Return the seconds since the last sign of life of each silent rank.

        While the store is silent, only rank 0, its host, is known to be silent too.
        """
        heard, store_silent = self._heard_at, self._store_silent()
        known = {0: 0.0} | {rank: changed for rank, (_, changed) in list(self._seen.items())}
        ages = {rank: (self._clock if store_silent and rank == 0 else heard) - at for rank, at in known.items()}
        return {rank: age for rank, age in ages.items() if age > _SILENT * self._tick and rank != self.ranks.rank}

    def _status(self, number: int = 0) -> Status:
        waited, late = self._clock - self._beat_at, self._late > 0 and not self._left
        return Status(self._who, self._position, waited, late, self._left, number)

    def _statuses(self) -> dict[int, Status | None]:
        """Return the status of this rank and of all ranks that were read."""
        seen = {rank: Status.unpack(raw) if raw else None for rank, (raw, _) in list(self._seen.items())}
        return {0: None} | seen | {self.ranks.rank: self._status()}

    def _describe_missing(self) -> str:
        return describe_missing(self._statuses(), self._silent(), self._store_silent())

    def _message(self) -> str:
        """Compose the reason for the end: who has waited longest, and for which ranks."""
        silent = self._silent()
        live = {rank: s for rank, s in self._statuses().items() if s and not s.left and rank not in silent}
        rank, first = max(live.items(), key=lambda item: (item[1].position[:3], item[1].waited, -item[0]))
        return (
            f"rank {rank} has waited {first.waited:.0f} s in {first.position} (the timeout is {self._limit:.0f} s):"
            f" {self._describe_missing()}. The run ends; the same command continues from its last checkpoint"
        )

    def _end(self, message: str) -> None:
        """Log ``message``, dump the stacks, and end the process, whose main thread blocks in C++."""
        self._ending.set()
        self._reason = message
        faulthandler.dump_traceback_later(_DUMP_SECONDS, exit=True, file=2)  # needs neither the GIL nor a disk
        up = time.monotonic() + (0 if self._store_silent() else _LINGER * self._tick)
        try:
            logger.error("%s. The stacks of all threads are in %s", message, self.dump_folder)
            self._dump(message)
        except Exception:
            logger.exception("rank %d could not write its stacks to %s", self.ranks.rank, self.dump_folder)
        finally:
            time.sleep(max(0.0, up - time.monotonic()))
            print(end="", flush=True)  # os._exit does not flush buffers
            os._exit(EXIT_HANG)

    def _dump(self, message: str) -> None:
        rank = self.ranks.rank
        self.dump_folder.mkdir(parents=True, exist_ok=True)
        with (self.dump_folder / f"hang_rank{rank:05d}.txt").open("w") as file:
            print(f"rank {rank} ({self._who}) in {self._position}\n{message}\n", file=file, flush=True)
            faulthandler.dump_traceback(file)
        dump_flight_recorder(self.dump_folder, rank)

    # ------------------------------------------------------------------ the publisher

    def _publishing(self) -> None:
        """Exchange statuses with the other ranks until the end. Body of the publisher thread.

        It returns early if the store fails. If the store hangs instead, the monitor notices that.
        """
        keys = [f"{self._prefix}{name}" for name in (*range(self.ranks.world), "reason")]
        try:
            # Use a separate connection. The default one is locked while the main thread waits for a key.
            store = c10d._get_default_store().clone()  # type: ignore[attr-defined]
            if self.ranks.main:
                # Create all keys, since reading an absent key blocks. A status overwritten here is published again.
                store.multi_set(keys, [""] * len(keys))
            for number in count():
                closed = self._closed.is_set()
                self._exchange(store, keys, number)
                if closed or (self._reason and not self._ending.is_set()):
                    return
                leaving = self._leaving.is_set()
                wake = self._closed if leaving else self._leaving
                wake.wait(0.02 if leaving and self.ranks.main else self._tick)
        except RuntimeError:
            return

    def _exchange(self, store: dist.Store, keys: list[str], number: int) -> None:
        """Publish this rank's status, and read the statuses of others and the reason for the end."""
        rank, now = self.ranks.rank, self._clock
        store.set(keys[rank], self._status(number).pack())
        if self._ending.is_set() and self._reason:
            store.set(keys[-1], self._reason)
        if not store.check([keys[0], keys[-1]]):
            return
        others = [other for other in range(self.ranks.world if self._read_all else 1) if other != rank]
        *values, reason = store.multi_get([keys[index] for index in (*others, -1)])
        for other, value in zip(others, values, strict=True):
            if other not in self._seen or self._seen[other][0] != value:
                self._seen[other] = (value, now)
        self._heard_at = now
        if not self._reason:
            self._reason = reason.decode()
