"""One process at a time trains in a run folder: a lock on the folder, and a file that says who holds it.

The lock (``.lock``) is an ``flock``, which the kernel releases with the process. Not every shared file system carries
it to other hosts, so that the holder also leaves ``holder.json``: Slurm's job, host, process, and by the file's time of
modification its last sign of life (a beat). A killed process leaves that file; :func:`hold_folder` finds out that it is
stale. Readers of a run take no lock.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from mmtrain.errors import UserError, os_errors
from mmtrain.files import exclusive, parse_json_line, write_atomically
from mmtrain.log import logger
from mmtrain.runs import slurm

NAME, _LOCK = "holder.json", ".lock"

#: Seconds from one beat to the next, after which a holder of another host counts as gone, and between two looks at it.
BEAT, STALE, _LOOK = 10.0, 60.0, 2.0
#: Two readings of the time at which one process began may differ by so many seconds.
_START_SLACK = 2.0
#: States in which a job has no process that trains: it waits for its start.
_NOT_STARTED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")


#: The tokens of the folders that this process holds.
_held_here: set[str] = set()


@dataclass(frozen=True)
class Holder:
    """The process that trains in a run folder.

    ``machine`` tells whether its number means anything to this process: it names the boot of the system and the
    namespace of its processes. ``began``: when the process was started. ``token`` is of this hold alone.
    """

    host: str
    machine: str
    pid: int
    began: float
    job: str | None
    restart: int
    token: str

    @classmethod
    def here(cls) -> Holder:
        """This process."""
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            began=psutil.Process().create_time(),
            job=os.environ.get("SLURM_JOB_ID"),
            restart=slurm.restart_count(),
            token=secrets.token_hex(8),
        )

    @classmethod
    def of(cls, run: Path) -> Holder | None:
        """The holder of the folder ``run`` by its file; None where there is no such file, or a damaged one."""
        try:
            found = parse_json_line((run / NAME).read_text(errors="replace"))
        except OSError:
            return None
        kinds = {"host": str, "machine": str, "pid": int, "began": float, "restart": int, "token": str}
        if found is None or not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
            return None
        job = found.get("job")
        return cls(**{key: found[key] for key in kinds}, job=None if job is None else str(job))

    def __str__(self) -> str:
        job = f" of Slurm job {self.job}" if self.job else ""
        return f"process {self.pid}{job} on {self.host}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # another system than Linux
        return f"{sys.platform} {socket.gethostname()}"


@contextmanager
def hold_folder(run: Path) -> Iterator[None]:
    """Hold the folder ``run``, which is there, against other processes that would train in it.

    A holder that is gone is replaced: at once where its process can be looked for here, its job has been started again
    or Slurm says that the job is over; else after :data:`STALE` seconds without a beat.

    Raises:
        UserError: when another process trains in it.
    """
    with ExitStack() as held:
        _lock(run, held)
        _wait_until_free(run)
        me = Holder.here()
        with os_errors(f"{run}: the run folder cannot be written", "choose another with --run-dir"):
            write_atomically(run / NAME, json.dumps(asdict(me)))
        _held_here.add(me.token)
        over = threading.Event()
        beats = threading.Thread(target=_beat, args=(run, me, over), name="holder", daemon=True)
        beats.start()
        try:
            yield
        finally:
            over.set()
            beats.join()
            _held_here.discard(me.token)
            if Holder.of(run) == me:
                with suppress(OSError):
                    (run / NAME).unlink()


def live_holder(run: Path) -> Holder | None:
    """Who trains in ``run`` as far as is known without waiting; None where nobody is known to."""
    holder = Holder.of(run)
    if holder is None or (alive := _alive(holder, slurm.restart_count())) is False:
        return None
    return holder if alive or time.time() - _beaten(run) < STALE else None


def _lock(run: Path, held: ExitStack) -> None:
    """Take the lock, where the file system has locks."""
    deadline = time.monotonic() + STALE
    while True:
        try:
            held.enter_context(exclusive(run / _LOCK, wait=False))
            return
        except BlockingIOError:
            holder = Holder.of(run)
            # a process that was killed may leave its lock to children, which end soon
            if holder is None or _alive(holder, slurm.restart_count()) is not False or time.monotonic() > deadline:
                raise refusal(run, holder) from None
            time.sleep(min(_LOOK, 0.2))
        except UserError as error:
            logger.debug("%s: no file lock (%s): holder.json alone is used", run, error)
            return


def _wait_until_free(run: Path) -> None:
    holder, begin, told = Holder.of(run), time.monotonic(), False
    if holder is None:
        return
    first = _beaten(run)
    old = _now(run) - first  # by the clock of the storage, on which the beats are written too
    while (alive := _alive(holder, slurm.restart_count())) is not False:
        if alive or _beaten(run) != first:
            raise refusal(run, holder)
        left = STALE - old - (time.monotonic() - begin)
        if left <= 0:
            break
        if not told:
            logger.info("%s was held by %s: waiting at most %.0f s for a sign of life", run, holder, left)
            told = True
        time.sleep(min(_LOOK, left))
        if (holder := Holder.of(run)) is None:
            return
    logger.info("%s was held by %s, which is gone", run, holder)


def _alive(holder: Holder, restart: int) -> bool | None:
    """Whether the process of ``holder`` is there; None where only its beats tell."""
    if holder.machine == _machine():
        if holder.pid == os.getpid():  # a folder that was moved away while this process held it is free
            return holder.token in _held_here
        try:
            began = psutil.Process(holder.pid).create_time()
        except psutil.Error:
            return False
        return abs(began - holder.began) < _START_SLACK
    if holder.job is None:
        return None
    if holder.job == os.environ.get("SLURM_JOB_ID"):
        return False if restart != holder.restart else None
    try:
        states = slurm.query_states([holder.job])
    except (OSError, subprocess.SubprocessError):
        return None
    state = (states or {}).get(holder.job)
    if state in (None, "COMPLETING"):  # a job that Slurm does not show may be another user's; this one is about to end
        return None
    return state in slurm.LIVE and state not in _NOT_STARTED


def refusal(run: Path, holder: Holder | None) -> UserError:
    """The error for a folder that ``holder`` has; None: it is not known who."""
    who = str(holder) if holder is not None else "another process"
    return UserError(
        f"{run}: {who} trains in this folder: wait for its end, end it with `mmtrain runs stop {run}`, or choose"
        f" another folder with name=… or --run-dir. If it is certain that nothing trains there, delete {run / NAME}"
    )


def _beaten(run: Path) -> float:
    try:
        return (run / NAME).stat().st_mtime
    except OSError:
        return 0.0


def _now(run: Path) -> float:
    """The time by the storage's own clock."""
    probe = run / ".writable"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _beat(run: Path, me: Holder, over: threading.Event) -> None:
    """Give signs of life until ``over``; end this process where another one has taken the folder."""
    while not over.wait(BEAT):
        try:
            os.utime(run / NAME)
        except OSError:
            continue  # a folder that is gone is found where it is written to
        other = Holder.of(run)
        if other is not None and other.token != me.token:
            logger.error(
                "%s: %s has taken this folder, since this process gave no sign of life for more than %.0f s; it ends"
                " here, and what was saved is safe",
                run,
                other,
                STALE,
            )
            os._exit(2)
