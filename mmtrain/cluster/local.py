"""Run on this machine, in several processes that find each other over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from mmtrain.cluster.task import run_training
from mmtrain.config import RunConfig, to_yaml
from mmtrain.errors import UserError
from mmtrain.log import log_to_console
from mmtrain.runs.folder import run_path

#: Variables by which torchrun and srun's tasks tell a process which rank it is.
_OF_RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)

#: How long the other processes may take to end after one has failed or rank 0 has finished, in seconds.
_GRACE = 10.0

#: The exit status of a rank whose input is wrong, or whose disk is full (mmtrain.errors.UserError).
_USER_ERROR = 2


def leave_ranks() -> None:
    """Forget that this process may be a rank of something else: a launcher starts ranks, and is none."""
    for name in [name for name in os.environ if name in _OF_RANKS or name.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    log_to_console()


def run_local(
    config: RunConfig,
    processes: int,
    config_name: str,
    overrides: Sequence[str],
    run_dir: str | None,
    *,
    dry_run: bool,
    restarts: int = 0,
) -> None:
    """Train in ``processes`` processes on this machine; one is this process itself, if it need not be started again.

    Args:
        restarts: start all ranks again so often after one of them was ended by a signal that was not ours.

    Raises:
        UserError: for a number of processes that makes no sense.
    """
    if processes < 1:
        raise UserError(f"--local {processes}: give the number of processes, at least 1")
    alone = processes == 1 and not restarts
    command = [sys.executable, "-m", "mmtrain", "train", "--config", config_name, *overrides]
    command += ["--run-dir", run_dir] if run_dir else []
    if dry_run:
        how = "in this process" if alone else f"in {processes} processes, each: {' '.join(command)}"
        print_dry_run(config, run_dir, how)
        return
    if alone:
        run_training(config, run_dir)
        return
    for left in range(restarts, -1, -1):
        status, killed = _together(command, processes)
        if not (killed and left):
            if status:
                sys.exit(status)
            return
        print(f"the ranks are started again from the newest checkpoint ({left - 1} restarts left)", file=sys.stderr)


def _together(command: Sequence[str], processes: int) -> tuple[int, bool]:
    """Run ``command`` once a rank. After the first failure the others are ended.

    Returns:
        An exit status, and whether a signal that did not come through us ended a rank.
    """
    asked: list[int] = []
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": threads,
    }
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    # Ctrl-C reaches the ranks by itself; they save and leave, and we wait for them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGUSR2, forward)
    while True:
        statuses = [process.poll() for process in ranks]
        failed = next((rank for rank, status in enumerate(statuses) if status), None)
        # when rank 0 has finished, all is written: a rank that hangs in taking the group down must not hold us
        if failed is not None or statuses[0] == 0:
            _end(ranks)
            if failed is None:
                return 0, False
            killed = (statuses[failed] or 0) < 0 and not asked
            return _status(failed, [process.returncode for process in ranks]), killed
        time.sleep(0.05)


def _status(failed: int, statuses: Sequence[int]) -> int:
    """The job's exit status, where rank ``failed`` was the first seen to fail; says which rank a signal ended.

    A rank that ends with a message for the user is the cause: one that lost its connection to it, and may be seen to
    end before it, is not.
    """
    if _USER_ERROR in statuses:
        return _USER_ERROR
    status = statuses[failed]
    if status < 0:
        print(f"rank {failed} was ended by {signal.Signals(-status).name}, and the job with it", file=sys.stderr)
        return 128 - status
    return status


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Give the ranks that still run ``_GRACE`` seconds to end by themselves, then kill them."""
    deadline = time.monotonic() + _GRACE
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(0.05)
    for process in ranks:
        if process.poll() is None:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def print_dry_run(config: RunConfig, run_dir: str | None, how: str) -> None:
    """Print the run folder, ``how`` the run would train, and the whole configuration."""
    print(f"run folder: {run_path(config, run_dir)}\nwould train {how}\n\n{to_yaml(config)}", end="")
