"""Runs on this machine, in several processes that connect over the loopback device."""

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

#: Environment variables that tell a process its rank.
_OF_RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK"),
    *("ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
)

#: Seconds that the other processes get to end after one has failed or rank 0 has finished.
_GRACE = 10.0

#: Exit status of a rank after a user error (mmtrain.errors.UserError), such as bad input or a full disk.
_USER_ERROR = 2


def leave_ranks() -> None:
    """Remove the variables that make this process a rank: a launcher starts ranks, but is none itself."""
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
    """Train in ``processes`` processes on this machine. A single one without restarts is this process itself.

    Args:
        config: The resolved configuration.
        processes: The number of ranks.
        config_name: Name or file of the configuration, for the command of the ranks.
        overrides: Overrides for the command of the ranks.
        run_dir: Run folder, or None for the default one.
        dry_run: Only print what would run.
        restarts: How often all ranks are started again after one was killed by a signal not sent by this process.

    Raises:
        UserError: If ``processes`` is less than 1.
    """
    if processes < 1:
        raise UserError(f"--local {processes}: must be at least 1 (number of processes)")
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
        print(f"restarting all ranks from the newest checkpoint ({left - 1} restarts left)", file=sys.stderr)


def _together(command: Sequence[str], processes: int) -> tuple[int, bool]:
    """Run ``command`` once for each rank. End all ranks after the first failure.

    Returns:
        The exit status, and whether a rank was killed by a signal that this process did not forward.
    """
    forwarded: list[int] = []
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
        forwarded.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    # the terminal sends Ctrl-C to the ranks too; they save and end while this process waits
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGUSR2, forward)
    while True:
        statuses = [process.poll() for process in ranks]
        failed = next((rank for rank, status in enumerate(statuses) if status), None)
        # all files are written when rank 0 has finished; do not wait for a rank that hangs while leaving the group
        if failed is not None or statuses[0] == 0:
            _end(ranks)
            if failed is None:
                return 0, False
            killed = (statuses[failed] or 0) < 0 and not forwarded
            return _status(failed, [process.returncode for process in ranks]), killed
        time.sleep(0.05)


def _status(failed: int, statuses: Sequence[int]) -> int:
    """Return the exit status of the launch, and print which rank was killed by a signal.

    A user error of any rank takes precedence: rank ``failed``, the first seen to fail, may only have lost its
    connection to the rank with the error.
    """
    if _USER_ERROR in statuses:
        return _USER_ERROR
    status = statuses[failed]
    if status < 0:
        print(f"rank {failed} was killed by {signal.Signals(-status).name}; all ranks were ended", file=sys.stderr)
        return 128 - status
    return status


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait up to ``_GRACE`` seconds for the ranks to end, then kill the remaining ones."""
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
    """Print the run folder, ``how`` the run would train (such as "in 2 processes"), and the whole configuration."""
    print(f"run folder: {run_path(config, run_dir)}\nwould train {how}\n\n{to_yaml(config)}", end="")
