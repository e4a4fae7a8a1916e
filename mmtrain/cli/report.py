"""``mmtrain report``: one HTML file about one or several runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders, such as runs/vim2_digits.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write (default: RUN/report.html; ./report.html for several runs).")
    ] = None,
) -> None:
    """Write curves, speed, configuration and jobs of runs into one HTML file that needs nothing else."""
    from mmtrain.launch.folder import existing
    from mmtrain.report import write_report

    paths = [existing(run) for run in runs]
    file = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    print(write_report(paths, file))
