"""``mmtrain runs``: what runs there are, how they fare, and how to stop them. ``mmtrain report``: a page about runs.

Nothing here imports torch.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from mmtrain.cli.common import SETTINGS, Run
from mmtrain.cli.sync import sync_command
from mmtrain.cluster.stop import stop_run
from mmtrain.errors import UserError, nearest
from mmtrain.runs.logs import show_logs
from mmtrain.runs.reader import check_run_folder, find_runs
from mmtrain.runs.status import run_statuses
from mmtrain.runs.table import table


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
    **SETTINGS,
)

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
    print(stop_run(run))


@app.command("logs")
def logs_command(
    run: Run,
    rank: Annotated[int, typer.Option(help="Whose log.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written; Ctrl-C ends it.")] = False,
) -> None:
    """Print where the log of a rank is, and its last 200 lines."""
    show_logs(run, rank, follow=follow)


def _console() -> Console:
    console = Console()
    # away from a terminal there is no width to keep to, and a shortened path is of no use
    return console if console.is_terminal else Console(width=300)


def _table(root: Path, width: int | None = None) -> Table:
    if not root.is_dir():
        hint = nearest(str(root), ("list", "watch", "stop", "logs", "sync"), label="or did you mean the command")
        raise UserError(f"{root}: there is no such folder; runs go to run_root (default: runs){hint}")
    found = run_statuses(find_runs(root))
    made = table(found, width or _console().width)
    if damaged := [status for status in found if status.damaged is not None]:
        names = ", ".join(f"{status.path / 'metrics.jsonl'} (line {status.damaged})" for status in damaged)
        made.caption = Text(f"damaged lines were left out: {names}")
        made.caption_justify = "left"
    return made


app.command("sync")(sync_command)


def report_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders, such as runs/vim2_digits.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write (default: RUN/report.html; ./report.html for several runs).")
    ] = None,
) -> None:
    """Write curves, speed, configuration and jobs of runs into one HTML file that needs nothing else."""
    from mmtrain.report import write_report  # brings matplotlib, which would double the time of a table of runs

    paths = [check_run_folder(run) for run in runs]
    file = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    print(write_report(paths, file))
