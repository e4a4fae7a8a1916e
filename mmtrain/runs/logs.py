"""Print the logs of a run, and follow what is written to them."""

from __future__ import annotations

import re
import time
from collections import deque
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.runs import journal, slurm
from mmtrain.runs.reader import check_run_folder, read_run
from mmtrain.runs.status import last_launch

#: How many lines of a log are shown, and the seconds between two looks at what was added.
_LINES, _EVERY = 200, 0.5
# submitit's names; a log without a rank, such as JOB_log.out of the batch script itself, does not match
_RANK_LOG = re.compile(r"(?P<job>.+)_(?P<rank>\d+)_log\.(out|err)")


def show_logs(run: str, rank: int, *, follow: bool = False) -> None:
    """Print the paths of the logs of ``rank`` and their last lines; with ``follow``, what comes after, until Ctrl-C."""
    folder = check_run_folder(run)
    reached: dict[Path, int] = {}
    try:
        while True:
            for path in log_files(folder, rank):  # asked again each time, since another job may have begun
                reached[path] = print_from(path, reached[path]) if path in reached else _print_end(path)
            if not follow:
                return
            time.sleep(_EVERY)
    except KeyboardInterrupt:
        return


def log_files(folder: Path, rank: int) -> list[Path]:
    """The log files of ``rank``: output and errors of the newest Slurm job, or the run's own log.txt.

    Raises:
        UserError: when there are none, with the ranks that have some.
    """
    own = folder / "log.txt"
    jobs = {path: found for path in folder.glob("slurm/*_log.*") if (found := _RANK_LOG.fullmatch(path.name))}
    launch = last_launch(read_run(folder, recent=1))
    # rank 0 of a Slurm job writes log.txt too, so that its age does not tell where the run was last
    here = not launch.get("job") if launch else not jobs
    if here and own.is_file():
        if rank:
            raise UserError(f"{own} is that of rank 0, and of rank {rank} there is none: leave out --rank")
        return [own]
    if here or not jobs:
        raise UserError(f"{folder} has no logs yet: its job has not begun (see `mmtrain runs`)")
    newest = jobs[max(jobs, key=lambda path: path.stat().st_mtime)]["job"]
    ranks = {path: int(found["rank"]) for path, found in jobs.items() if found["job"] == newest}
    if files := sorted((path for path, its in ranks.items() if its == rank), reverse=True):
        return files
    first, last = min(ranks.values()), max(ranks.values())
    there = f"rank {first}" if first == last else f"ranks {first} to {last}"
    raise UserError(f"{folder}: job {newest} has no log of rank {rank}; it has {there}")


def _print_end(path: Path) -> int:
    """Print the path and the last lines; returns how far the file was read."""
    print(f"== {path} ==")
    with path.open("rb") as file:
        for line in deque(file, _LINES):
            print(line.decode(errors="replace").rstrip("\n"))
        return file.tell()


def print_from(path: Path, reached: int) -> int:
    """Print what was written to ``path`` after byte ``reached``; returns how far it was read."""
    if path.stat().st_size < reached:  # begun anew
        return _print_end(path)
    with path.open("rb") as file:
        file.seek(reached)
        print(file.read().decode(errors="replace"), end="", flush=True)
        return file.tell()


def follow_job(run: Path) -> None:
    """Print the log of rank 0 until the run's newest job is gone from the queue; Ctrl-C leaves the job alone."""
    job, reached = journal.last_job(run), 0
    log = run / "slurm" / f"{job}_0_log.err"
    try:
        while True:
            live = job is not None and slurm.is_live(job)
            if log.is_file():
                reached = print_from(log, reached)
            if not live:
                return
            time.sleep(2)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; mmtrain runs logs {run} --follow shows it again")
