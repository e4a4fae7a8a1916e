"""A run that hangs ends, and says which ranks were missing.

A collective that waits for a rank that is stuck, stopped or dead waits in C++, often for ever. So each rank has two
threads beside its main one: the *publisher* publishes, about once a second, where the main thread is, and reads what
others published; the *monitor* counts the time since the main thread's last :meth:`Watchdog.beat` and, past the
timeout, names the missing ranks, dumps all stacks and the flight recorder, and ends the process with :data:`EXIT_HANG`.

They are two, because no read from a TCPStore is safe against a host that is stopped: in torch 2.13 ``get``, ``check``,
``multi_get`` and even the constructor outlast their timeout, for ever. They release the GIL, so only the publisher
hangs, which is how the monitor knows.

Rank 0 reads all statuses, decides for all and publishes the reason for the end; the others read rank 0's status and
that reason, so that the traffic grows with the number of ranks, not with its square. Another rank decides by itself
when the store or rank 0 does not answer. Clocks of different hosts are never compared: a rank is silent when its status
has stopped changing. A rank whose main thread holds the GIL for ever is silent too; the launcher has to kill it.
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

#: Exit status of a rank that the watchdog ended: EX_TEMPFAIL of sysexits.h, "try again later".
EXIT_HANG = 75

#: Ticks (of 1 s, or less for short timeouts) without a change of its status after which a rank does not answer.
_SILENT = 4
#: Ticks for which the reason is up before its author, who may host the store, ends.
_LINGER = 3
#: Ticks past the timeout after which a rank reads the status of all, and after which it decides, if rank 0 has not.
_READ_ALL, _DECIDE = 3, 3 + _SILENT + 2
#: Seconds for the message and the dumps: a disk that hangs, perhaps the cause of all, must not keep the process.
_LAST_WORDS = 30.0

_instances = count()


class Watchdog:
    """Ends this process when a rank of the run has been away for too long; use it as a context, on all ranks alike.

    Args:
        start_timeout: seconds that a rank may go without a beat before :meth:`first_step_done`.
        step_timeout: the same, after it.
        dump_folder: gets the stacks of all threads (``hang_rank00000.txt`` of rank 0) and the flight recorder's files.
    """

    def __init__(self, ranks: Ranks, start_timeout: float, step_timeout: float, dump_folder: Path) -> None:
        self.ranks, self.dump_folder = ranks, dump_folder
        self._limit, self._step_timeout = start_timeout, step_timeout
        self._tick = min(1.0, start_timeout / 8, step_timeout / 8)
        self._who, self._left = f"{socket.gethostname()}, pid {os.getpid()}", ""
        self._position = Position(0, 0, 0, "start")
        # seconds for which this process has run: now, at the last beat, at the last answer of the store
        self._clock = self._beat_at = self._heard_at = 0.0
        # seconds past the timeout (negative before it), and for how many ticks rank 0 has seen another rank past its
        self._late, self._others_late = -start_timeout, 0
        # of each rank that was read: its packed status, and the clock when that last changed
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
            # it may be the echo of an end by which another rank has just ended: let that be said instead
            self._closed.wait(_LINGER * self._tick)
        self._left = "has finished" if error is None else f"left after {type(error).__name__}: {str(error)[:400]}"
        self._leaving.set()
        self._monitor.join()  # does not return where it ends the process
        if self.ranks.main:
            # the host of the store goes last, or torch complains in the publishers of the others
            end = time.monotonic() + _LINGER * self._tick
            gone = self._silent()  # a rank that was killed will never say that it leaves
            while time.monotonic() < end and not all(
                rank in gone or (s and s.left) for rank, s in self._statuses().items()
            ):
                time.sleep(0.02)
        self._closed.set()
        self._publisher.join(_LINGER * self._tick)

    def beat(self, step: int, phase: str) -> None:
        """The main thread comes to ``phase`` of ``step``. Beat alike on all ranks, and often within a long phase."""
        self._position = self._position.next(step, phase)

    def first_step_done(self) -> None:
        """Kernels are compiled and data is open: from now on ``step_timeout`` counts. This is a beat too."""
        self.beat(self._position.step, self._position.phase)
        self._limit = self._step_timeout

    def describe(self) -> str:
        """Which ranks are missing, and where they were; for the handler of an error that a collective raised.

        Takes some ticks: a rank that has died just now must be seen to be silent.
        """
        if self.ranks.world == 1:
            return "there is no other rank"
        self._read_all = self._described = True
        for _ in range(_SILENT + 3):
            self._closed.wait(self._tick)
            if self._silent():
                break
        if self._ending.is_set():
            self._monitor.join()  # which ends the process
        return self._describe_missing()

    # ------------------------------------------------------------------ the monitor

    def _monitoring(self) -> None:
        before, position = time.monotonic(), self._position
        while not self._leaving.wait(self._tick):
            now = time.monotonic()
            # Slurm suspends a job by SIGSTOP: this process's own sleep is not a time in which others were silent
            self._clock += min(now - before, 3 * self._tick)
            before = now
            limit = self._limit  # read before the position: the beat of first_step_done comes before its shorter limit
            if self._position is not position:
                position, self._beat_at = self._position, self._clock
            self._late = self._clock - self._beat_at - limit
            if self._reason:
                self._end(self._reason)
            elif self._should_end():
                self._end(self._message())

    def _should_end(self) -> bool:
        if self.ranks.main:
            # more than once, since what is read may be a tick old and the rank on its way again
            late = any(raw.startswith(b"!") for raw, _ in list(self._seen.values()))
            self._others_late = self._others_late + 1 if late else 0
            return self._late > 0 or self._others_late > 2
        if self._late > _READ_ALL * self._tick:
            self._read_all = True
        return self._late > (0 if self._store_silent() else _DECIDE * self._tick)

    def _store_silent(self) -> bool:
        """True while the store does not answer."""
        return self._clock - self._heard_at > _SILENT * self._tick

    def _silent(self) -> dict[int, float]:
        """Of the ranks that do not answer, for how many seconds. While the store is away we know only of its host."""
        heard, store_silent = self._heard_at, self._store_silent()
        known = {0: 0.0} | {rank: changed for rank, (_, changed) in list(self._seen.items())}
        ages = {rank: (self._clock if store_silent and rank == 0 else heard) - at for rank, at in known.items()}
        return {rank: age for rank, age in ages.items() if age > _SILENT * self._tick and rank != self.ranks.rank}

    def _status(self, number: int = 0) -> Status:
        waited, late = self._clock - self._beat_at, self._late > 0 and not self._left
        return Status(self._who, self._position, waited, late, self._left, number)

    def _statuses(self) -> dict[int, Status | None]:
        seen = {rank: Status.unpack(raw) if raw else None for rank, (raw, _) in list(self._seen.items())}
        return {0: None} | seen | {self.ranks.rank: self._status()}

    def _describe_missing(self) -> str:
        return describe_missing(self._statuses(), self._silent(), self._store_silent())

    def _message(self) -> str:
        silent = self._silent()
        live = {rank: s for rank, s in self._statuses().items() if s and not s.left and rank not in silent}
        rank, first = max(live.items(), key=lambda item: (item[1].position[:3], item[1].waited, -item[0]))
        return (
            f"rank {rank} has waited {first.waited:.0f} s in {first.position} (the timeout is {self._limit:.0f} s):"
            f" {self._describe_missing()}; the run is ended: the same command goes on from its last checkpoint"
        )

    def _end(self, message: str) -> None:
        """Say ``message``, dump, and end the process: its main thread sits in C++ and hears no exception."""
        self._ending.set()
        self._reason = message
        faulthandler.dump_traceback_later(_LAST_WORDS, exit=True, file=2)  # needs neither the GIL nor a disk
        up = time.monotonic() + (0 if self._store_silent() else _LINGER * self._tick)
        try:
            logger.error("%s; stacks are in %s", message, self.dump_folder)
            self._dump(message)
        except Exception:
            logger.exception("rank %d cannot write its stacks", self.ranks.rank)
        finally:
            time.sleep(max(0.0, up - time.monotonic()))
            print(end="", flush=True)  # os._exit would lose what is buffered
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
        """Exchange statuses until the end, or until the store is gone: where that is a hang, the monitor sees it."""
        keys = [f"{self._prefix}{name}" for name in (*range(self.ranks.world), "reason")]
        try:
            # a connection of our own: the default one is locked while the main thread waits for a key
            store = c10d._get_default_store().clone()  # type: ignore[attr-defined]
            if self.ranks.main:
                # so that no read meets an absent key and waits; who published before this does so again in a tick
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
