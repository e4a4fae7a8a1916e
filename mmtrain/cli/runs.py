"""``mmtrain runs``: list, watch and stop runs. ``mmtrain report``: write an HTML report.

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
    """Group that runs ``list`` if the first argument is no command.

    A folder with the name of a command is written with its path, such as ``mmtrain runs ./watch``.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="runs",
    cls=_ListedByDefault,
    help="""List, watch and stop runs, and read their logs.

    `mmtrain runs [ROOT]` is short for `mmtrain runs list [ROOT]`.

    \b
    Examples:
      mmtrain runs                              # all runs in ./runs with state and results
      mmtrain runs watch                        # the same, refreshed, with the state of Slurm jobs
      mmtrain runs logs runs/my_run --follow    # log of rank 0
      mmtrain runs stop runs/my_run             # save, end and do not requeue
      mmtrain runs sync runs/my_run             # upload offline W&B records
    """,
    **SETTINGS,
)

Root = Annotated[Path, typer.Argument(help="Folder that contains the run folders.")]


@app.command("list")
def list_command(root: Root = Path("runs")) -> None:
    """List the runs in a folder with their state and results."""
    _console().print(_table(root))


@app.command("watch")
def watch_command(
    root: Root = Path("runs"),
    every: Annotated[float, typer.Option(help="Seconds between two updates.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
) -> None:
    """List the runs and refresh the table until Ctrl-C, which does not affect the runs."""
    if every <= 0:
        raise UserError(f"--every {every:g}: must be more than 0 (seconds between two updates)")
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
    """Make a run save a checkpoint and end without being requeued.

    The command that started the run resumes it.
    """
    print(stop_run(run))


@app.command("logs")
def logs_command(
    run: Run,
    rank: Annotated[int, typer.Option(help="Rank whose log is printed.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines until Ctrl-C.")] = False,
) -> None:
    """Print the path of a rank's log and its last 200 lines."""
    show_logs(run, rank, follow=follow)


def _console() -> Console:
    console = Console()
    # output that is not a terminal has no width, and a shortened path would be useless
    return console if console.is_terminal else Console(width=300)


def _table(root: Path, width: int | None = None) -> Table:
    if not root.is_dir():
        hint = nearest(str(root), ("list", "watch", "stop", "logs", "sync"), label="or did you mean the command")
        raise UserError(f"{root}: no such folder. Runs are written to the folder of run_root (default: runs){hint}")
    found = run_statuses(find_runs(root))
    shown = table(found, width or _console().width)
    if damaged := [status for status in found if status.damaged is not None]:
        names = ", ".join(f"{status.path / 'metrics.jsonl'} (line {status.damaged})" for status in damaged)
        shown.caption = Text(f"damaged lines were ignored: {names}")
        shown.caption_justify = "left"
    return shown


app.command("sync")(sync_command)


def report_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders, such as runs/vim2_digits.")],
    out: Annotated[
        Path | None, typer.Option(help="File to write (default: RUN/report.html, or ./report.html for several runs).")
    ] = None,
) -> None:
    """Write an HTML report of one or several runs: curves, speed, configuration and jobs.

    The report is a single file without links to other files.

    \b
    Examples:
      mmtrain report runs/my_run
      mmtrain report runs/my_run runs/other --out compared.html
    """
    from mmtrain.report import write_report  # imports matplotlib, which would double the time of `mmtrain runs`

    paths = [check_run_folder(run) for run in runs]
    file = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    print(write_report(paths, file))
