"""Lock a run folder, so that only one process at a time trains in it.

The lock (``.lock``) is an ``flock``, which the kernel releases when the process ends. Not every shared file system
supports it between hosts. The process therefore also writes ``holder.json`` with its Slurm job, host and pid, and
updates the file's modification time regularly as a sign of life (a beat). A killed process leaves this file, and
:func:`hold_folder` detects that it is stale. Readers of a run take no lock.
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

#: In seconds: time between two beats; time without a beat after which a holder is gone; time between two checks.
BEAT, STALE, _CHECK_EVERY = 10.0, 60.0, 2.0
#: Two readings of the start time of the same process can differ by this many seconds.
_START_SLACK = 2.0
#: States of a job that has no process, since it waits for its start.
_NOT_STARTED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")


#: The tokens of the folders that this process has locked.
_held_here: set[str] = set()


@dataclass(frozen=True)
class Holder:
    """The process that trains in a run folder, as ``holder.json`` describes it.

    Attributes:
        machine: identifies the boot and the pid namespace. ``pid`` is meaningful only on the same machine.
        began: start time of the process in Unix seconds.
        job: Slurm job, or None.
        restart: Slurm's restart count of the job.
        token: random identifier of this lock.
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
        """Describe this process."""
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
        """Read ``holder.json`` of the folder ``run``. Return None if it is missing or damaged."""
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
    """Identify this boot of the machine and the pid namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{sys.platform} {socket.gethostname()}"


@contextmanager
def hold_folder(run: Path) -> Iterator[None]:
    """Lock the existing folder ``run`` within this context, against other processes that want to train in it.

    A holder that has ended is replaced. It is replaced at once if its process can be checked here, if its job was
    restarted, or if Slurm reports the job as over. Otherwise it is replaced after :data:`STALE` seconds without a beat.

    Raises:
        UserError: if another process trains in the folder.
    """
    with ExitStack() as locks:
        _lock(run, locks)
        _wait_until_free(run)
        holder = Holder.here()
        with os_errors(f"{run}: the run folder cannot be written", "choose another with --run-dir"):
            write_atomically(run / NAME, json.dumps(asdict(holder)))
        _held_here.add(holder.token)
        over = threading.Event()
        beats = threading.Thread(target=_beat, args=(run, holder, over), name="holder", daemon=True)
        beats.start()
        try:
            yield
        finally:
            over.set()
            beats.join()
            _held_here.discard(holder.token)
            if Holder.of(run) == holder:
                with suppress(OSError):
                    (run / NAME).unlink()


def live_holder(run: Path) -> Holder | None:
    """Return the process that trains in ``run``, or None if there is none. Does not wait for beats."""
    holder = Holder.of(run)
    if holder is None or (alive := _alive(holder, slurm.restart_count())) is False:
        return None
    return holder if alive or time.time() - _beaten(run) < STALE else None


def _lock(run: Path, locks: ExitStack) -> None:
    """Take the file lock, if the file system supports locks."""
    deadline = time.monotonic() + STALE
    while True:
        try:
            locks.enter_context(exclusive(run / _LOCK, wait=False))
            return
        except BlockingIOError:
            holder = Holder.of(run)
            # Children of a killed process may still have the lock. They end soon.
            if holder is None or _alive(holder, slurm.restart_count()) is not False or time.monotonic() > deadline:
                raise refusal(run, holder) from None
            time.sleep(min(_CHECK_EVERY, 0.2))
        except UserError as error:
            logger.debug("%s: no file lock (%s). Only holder.json is used", run, error)
            return


def _wait_until_free(run: Path) -> None:
    """Wait until it is clear that an earlier holder has ended. Raise UserError if it has not."""
    holder, begin, logged = Holder.of(run), time.monotonic(), False
    if holder is None:
        return
    first = _beaten(run)
    old = _now(run) - first  # by the clock of the storage, which also dates the beats
    while (alive := _alive(holder, slurm.restart_count())) is not False:
        if alive or _beaten(run) != first:
            raise refusal(run, holder)
        left = STALE - old - (time.monotonic() - begin)
        if left <= 0:
            break
        if not logged:
            logger.info("%s is locked by %s. Waiting up to %.0f s for a sign of life", run, holder, left)
            logged = True
        time.sleep(min(_CHECK_EVERY, left))
        if (holder := Holder.of(run)) is None:
            return
    logger.info("%s was locked by %s, which has ended. Taking over the folder", run, holder)


def _alive(holder: Holder, restart: int) -> bool | None:
    """Return whether the process of ``holder`` exists, or None if this can only be seen from its beats."""
    if holder.machine == _machine():
        if holder.pid == os.getpid():  # this process may have had the lock on a folder that was moved
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
    if state in (None, "COMPLETING"):  # not shown: maybe a job of another user; completing: still about to end
        return None
    return state in slurm.LIVE and state not in _NOT_STARTED


def refusal(run: Path, holder: Holder | None) -> UserError:
    """Return the error for a folder that is locked by ``holder`` (None: unknown process)."""
    who = str(holder) if holder is not None else "another process"
    return UserError(
        f"{run}: {who} is training in this folder. Wait until it ends, stop it with `mmtrain runs stop {run}`, or"
        " choose another folder with name=… or --run-dir. If you are sure that no process trains there, delete"
        f" {run / NAME}"
    )


def _beaten(run: Path) -> float:
    """Return the time of the holder's last beat, or 0."""
    try:
        return (run / NAME).stat().st_mtime
    except OSError:
        return 0.0


def _now(run: Path) -> float:
    """Return the current time by the clock of the storage."""
    probe = run / ".writable"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink()


def _beat(run: Path, holder: Holder, over: threading.Event) -> None:
    """Write beats until ``over`` is set. End this process if another one has taken over the folder."""
    while not over.wait(BEAT):
        try:
            os.utime(run / NAME)
        except OSError:
            continue  # if the folder was deleted, the next write to it reports that
        other = Holder.of(run)
        if other is not None and other.token != holder.token:
            logger.error(
                "%s: %s has taken over this folder, because this process gave no sign of life for more than %.0f s."
                " This process ends now; saved checkpoints are safe",
                run,
                other,
                STALE,
            )
            os._exit(2)
