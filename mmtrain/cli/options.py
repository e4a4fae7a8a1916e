"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Option("--config", "-c", help="A name in configs/, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optim.lr=2e-4 train.epochs=3.")
]
RunDir = Annotated[str | None, typer.Option(help="The run folder (default: run_root/name).")]
Run = Annotated[str, typer.Argument(help="A run folder, such as runs/vim2_digits.")]
Out = Annotated[Path, typer.Option(help="Folder to write; it appears only when it is complete.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
Workers = Annotated[int | None, typer.Option(help="Processes (default: one per core, at most 8).")]
Checkpoint = Annotated[str, typer.Option(help="best, last or a step.")]
