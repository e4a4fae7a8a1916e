"""What ``mmtrain runs`` shows."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError


def show_runs(root: Path) -> None:
    """A table of the run folders under ``root``, oldest first."""
    from rich.console import Console
    from rich.table import Table

    from mmtrain.train.run_folder import RunFolder

    if not root.is_dir():
        raise UserError(f"{root}: there is no such folder; runs go to run_root (default: runs)")
    found = [RunFolder(path.parent) for path in root.glob("**/config.yaml") if "checkpoints" not in path.parts]
    if not found:
        raise UserError(f"{root} holds no runs yet: start one with `mmtrain train --config NAME`")
    table = Table("run", "model", "state", "step", "best val", "test", "last written", box=None)
    for run in sorted(found, key=lambda r: r.config_file.stat().st_mtime):
        table.add_row(*_row(run))
    console = Console()
    # away from a terminal there is no width to keep to, and a shortened path is of no use
    (console if console.is_terminal else Console(width=200)).print(table)


def _row(run: Any) -> tuple[str, ...]:
    from mmtrain.train.tracking import read_metrics

    config, lines, result = run.config(), read_metrics(run), run.result()
    step = max((line.get("step", 0) for line in lines), default=0)
    val = [line for line in lines if line["kind"] == "eval" and line["split"] == "val"]
    metric = {"classification": ("top1", max), "forecasting": ("mse", min)}[config.task.kind]
    best = f"{metric[0]} {metric[1](line[metric[0]] for line in val):.4g}" if val else "-"
    test = f"{metric[0]} {result['test'][metric[0]]:.4g}" if result and result["test"] else "-"
    written = run.metrics_file.stat().st_mtime if run.metrics_file.exists() else run.config_file.stat().st_mtime
    ago = time.time() - written
    shown = f"{ago:.0f} s ago" if ago < 120 else f"{ago / 60:.0f} min ago" if ago < 7200 else f"{ago / 3600:.0f} h ago"
    return str(run.path), config.model.name, "finished" if result else "unfinished", str(step), best, test, shown
