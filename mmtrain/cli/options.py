"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Config = Annotated[str, typer.Option("--config", "-c", help="A name in configs/, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as optim.lr=2e-4 train.epochs=3.")
]
RunDir = Annotated[str | None, typer.Option(help="The run folder (default: run_root/name).")]
Run = Annotated[str, typer.Argument(help="A run folder, such as runs/vim2_digits.")]
Checkpoint = Annotated[str, typer.Option(help="best, last or a step.")]
