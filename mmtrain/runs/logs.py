"""Print the logs of a run, and follow them while they grow."""

from __future__ import annotations

import re
import time
from collections import deque
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.runs import journal, slurm
from mmtrain.runs.reader import check_run_folder, read_run
from mmtrain.runs.status import last_launch

#: Number of lines of a log that are shown; seconds between two checks for new lines.
_LINES, _EVERY = 200, 0.5
# Names chosen by submitit. Logs without a rank, such as JOB_log.out of the batch script, do not match.
_RANK_LOG = re.compile(r"(?P<job>.+)_(?P<rank>\d+)_log\.(out|err)")


def show_logs(run: str, rank: int, *, follow: bool = False) -> None:
    """Print the paths of the logs of ``rank`` and their last lines.

    Args:
        follow: continue to print new lines until Ctrl-C.
    """
    folder = check_run_folder(run)
    reached: dict[Path, int] = {}
    try:
        while True:
            for path in log_files(folder, rank):  # searched each time, since a new job may have started
                reached[path] = print_from(path, reached[path]) if path in reached else _print_end(path)
            if not follow:
                return
            time.sleep(_EVERY)
    except KeyboardInterrupt:
        return


def log_files(folder: Path, rank: int) -> list[Path]:
    """Return the log files of ``rank``: stdout and stderr of the newest Slurm job, or log.txt without Slurm.

    Raises:
        UserError: if there are none, with the ranks that have logs.
    """
    own = folder / "log.txt"
    jobs = {path: found for path in folder.glob("slurm/*_log.*") if (found := _RANK_LOG.fullmatch(path.name))}
    launch = last_launch(read_run(folder, recent=1))
    # Rank 0 of a Slurm job writes log.txt too, so its existence does not show that the last launch was without Slurm.
    here = not launch.get("job") if launch else not jobs
    if here and own.is_file():
        if rank:
            raise UserError(f"--rank {rank}: this run has a log of rank 0 only ({own}). Omit --rank")
        return [own]
    if here or not jobs:
        raise UserError(f"{folder} has no logs yet, since its job has not started. See `mmtrain runs`")
    newest = jobs[max(jobs, key=lambda path: path.stat().st_mtime)]["job"]
    ranks = {path: int(found["rank"]) for path, found in jobs.items() if found["job"] == newest}
    if files := sorted((path for path, owner in ranks.items() if owner == rank), reverse=True):
        return files
    first, last = min(ranks.values()), max(ranks.values())
    existing = f"rank {first}" if first == last else f"ranks {first} to {last}"
    raise UserError(f"--rank {rank}: job {newest} of {folder} has no log of this rank, only of {existing}")


def _print_end(path: Path) -> int:
    """Print the path and the last lines of a log. Return the number of bytes read."""
    print(f"== {path} ==")
    with path.open("rb") as file:
        for line in deque(file, _LINES):
            print(line.decode(errors="replace").rstrip("\n"))
        return file.tell()


def print_from(path: Path, reached: int) -> int:
    """Print the content of ``path`` after byte ``reached``. Return the number of bytes read so far."""
    if path.stat().st_size < reached:  # the file was replaced
        return _print_end(path)
    with path.open("rb") as file:
        file.seek(reached)
        print(file.read().decode(errors="replace"), end="", flush=True)
        return file.tell()


def follow_job(run: Path) -> None:
    """Print the log of rank 0 until the newest job of the run leaves the queue. Ctrl-C does not stop the job."""
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
        print(f"\nThe job continues. To follow its log again, run `mmtrain runs logs {run} --follow`")
