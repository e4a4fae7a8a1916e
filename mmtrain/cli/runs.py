"""``mmtrain runs logs``: the log of a rank, of Slurm's newest job or of the run on this machine.

``mmtrain report``: one HTML file about one or several runs.

``mmtrain runs``: what runs there are, how they fare, and how to stop them. Nothing here imports torch.
"""

from __future__ import annotations

import re
import time
from collections import deque
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmtrain.cli.options import Run
from mmtrain.cli.sync import sync_command
from mmtrain.errors import UserError, nearest
from mmtrain.runs.reader import check_run_folder, read_run
from mmtrain.runs.status import last_launch

_LINES, _EVERY = 200, 0.5
# submitit's names; what is no rank, such as JOB_log.out of the batch script itself, is left out
_NAME = re.compile(r"(?P<job>.+)_(?P<rank>\d+)_log\.(out|err)")


def show_logs(run: str, rank: int, *, follow: bool = False) -> None:
    """Print the paths of the logs of ``rank`` and their last lines; with ``follow``, what comes after, until Ctrl-C."""
    folder = check_run_folder(run)
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
    begin = last_launch(read_run(folder, recent=1))
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


def report_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders, such as runs/vim2_digits.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write (default: RUN/report.html; ./report.html for several runs).")
    ] = None,
) -> None:
    """Write curves, speed, configuration and jobs of runs into one HTML file that needs nothing else."""
    from mmtrain.report import write_report
    from mmtrain.runs.reader import check_run_folder

    paths = [check_run_folder(run) for run in runs]
    file = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    print(write_report(paths, file))


class _ListedByDefault(TyperGroup):
    """``mmtrain runs`` and ``mmtrain runs FOLDER`` are ``mmtrain runs list``. A folder named as a command: ./watch."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="runs",
    cls=_ListedByDefault,
    help="List the runs with their state and results (`mmtrain runs [ROOT]`), watch, stop and read them.",
)
app.command("sync")(sync_command)

Root = Annotated[Path, typer.Argument(help="The folder that holds the run folders.")]


@app.command("list")
def list_command(root: Root = Path("runs")) -> None:
    """List the runs with their state and results; also `mmtrain runs [ROOT]`."""
    _console().print(_table(root))


@app.command("watch")
def watch_command(
    root: Root = Path("runs"),
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
) -> None:
    """List the runs, again and again; Ctrl-C ends it, and leaves the runs alone."""
    from rich.live import Live

    if every <= 0:
        raise UserError(f"--every {every:g}: give the seconds between two looks, more than 0")
    console = _console()
    if once:
        console.print(_table(root))
        return
    try:
        with Live(_table(root, console.width), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(_table(root, console.width), refresh=True)
    except KeyboardInterrupt:
        return


@app.command("stop")
def stop_command(run: Run) -> None:
    """Let a run save and end, without being queued again. The command that started it goes on with it."""
    from mmtrain.cluster.stop import stop_run

    print(stop_run(run))


@app.command("logs")
def logs_command(
    run: Run,
    rank: Annotated[int, typer.Option(help="Whose log.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written; Ctrl-C ends it.")] = False,
) -> None:
    """Print where the log of a rank is, and its last 200 lines."""

    show_logs(run, rank, follow=follow)


def _console() -> Any:
    from rich.console import Console

    console = Console()
    # away from a terminal there is no width to keep to, and a shortened path is of no use
    return console if console.is_terminal else Console(width=300)


def _table(root: Path, width: int | None = None) -> Any:
    from mmtrain.runs.reader import find_runs
    from mmtrain.runs.status import run_statuses
    from mmtrain.runs.table import table

    if not root.is_dir():
        hint = nearest(str(root), ("list", "watch", "stop", "logs", "sync"), label="or did you mean the command")
        raise UserError(f"{root}: there is no such folder; runs go to run_root (default: runs){hint}")
    return table(run_statuses(find_runs(root)), width or _console().width)
