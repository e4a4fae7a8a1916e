"""``mmtrain runs logs``: the log of a rank, of Slurm's newest job or of the run on this machine."""

from __future__ import annotations

import re
import time
from collections import deque
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.launch.folder import existing, read
from mmtrain.launch.status import last_begin

_LINES, _EVERY = 200, 0.5
# submitit's names; what is no rank, such as JOB_log.out of the batch script itself, is left out
_NAME = re.compile(r"(?P<job>.+)_(?P<rank>\d+)_log\.(out|err)")


def show_logs(run: str, rank: int, *, follow: bool = False) -> None:
    """Print the paths of the logs of ``rank`` and their last lines; with ``follow``, what comes after, until Ctrl-C."""
    folder = existing(run)
    reached: dict[Path, int] = {}
    for path in log_files(folder, rank):
        reached[path] = _show(path)
    try:
        while follow:
            time.sleep(_EVERY)
            for path in log_files(folder, rank):  # asked anew, since another job may have begun
                reached[path] = go_on(path, reached[path]) if path in reached else _show(path)
    except KeyboardInterrupt:
        return


def log_files(folder: Path, rank: int) -> list[Path]:
    """The log files of ``rank``: of the newest Slurm job its output and errors, or the run's own log.txt.

    Raises:
        UserError: when there are none, with the ranks that have some.
    """
    own = folder / "log.txt"
    jobs = {path: found for path in folder.glob("slurm/*_log.*") if (found := _NAME.fullmatch(path.name))}
    begin = last_begin(read(folder, recent=1))
    # rank 0 of a Slurm job writes log.txt too, so that its age does not tell where the run was last
    here = not begin.get("job") if begin else not jobs
    if here and own.is_file():
        if rank:
            raise UserError(f"{own} is that of rank 0, and of rank {rank} there is none: leave out --rank")
        return [own]
    if here or not jobs:
        raise UserError(f"{folder} has no logs yet: its job has not begun (see `mmtrain runs`)")
    newest = jobs[max(jobs, key=lambda path: path.stat().st_mtime)]["job"]
    of_job = {path: int(found["rank"]) for path, found in jobs.items() if found["job"] == newest}
    files = sorted((path for path, its in of_job.items() if its == rank), reverse=True)
    if not files:
        raise UserError(f"{folder}: job {newest} has no log of rank {rank}; it has {_ranges(sorted(of_job.values()))}")
    return files


def _ranges(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _show(path: Path) -> int:
    """Print the path and the last lines; returns how far the file was read."""
    print(f"== {path} ==")
    with path.open("rb") as file:
        for line in deque(file, _LINES):
            print(line.decode(errors="replace").rstrip("\n"))
        return file.tell()


def go_on(path: Path, reached: int) -> int:
    """Print what was written to ``path`` after byte ``reached``; returns how far it was read."""
    if path.stat().st_size < reached:  # begun anew
        return _show(path)
    with path.open("rb") as file:
        file.seek(reached)
        print(file.read().decode(errors="replace"), end="", flush=True)
        return file.tell()
