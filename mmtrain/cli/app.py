"""The commands of ``mmtrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmtrain.cli import data, runs
from mmtrain.cli.doctor import doctor_command
from mmtrain.cli.model import model_command, plan_command
from mmtrain.cli.options import Checkpoint, Overrides, Run
from mmtrain.cli.predict import predict_command
from mmtrain.cli.runs import report_command
from mmtrain.cli.train import train_command

app = typer.Typer(
    name="mmtrain",
    help="Train and use MambaMixer models: ViM2 for images, TSM2 for time series.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train_command)
app.command("predict")(predict_command)
app.command("model")(model_command)
app.command("plan")(plan_command)
app.command("doctor")(doctor_command)
app.command("report")(report_command)
app.add_typer(data.app, name="data")
app.add_typer(runs.app, name="runs")


@app.command("eval")
def eval_command(
    run: Run,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    checkpoint: Checkpoint = "best",
) -> None:
    """Measure a trained run on a whole split of its data (overrides such as data.root=… may move the data)."""
    import json

    from mmtrain.cli.predict import evaluate_run

    print(json.dumps(evaluate_run(run, split, checkpoint, overrides or []), indent=1))


@app.command("export")
def export_command(
    run: Run,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[
        str, typer.Option(help="safetensors, onnx or torch (a program without mmtrain).")
    ] = "safetensors",
    checkpoint: Checkpoint = "best",
) -> None:
    """Write a trained model, with the configuration and what prediction needs beside it."""
    from mmtrain.export import export_trained
    from mmtrain.inference.trained import load_trained

    path = export_trained(load_trained(run, checkpoint), out, format)
    print(f"{path}: {', '.join(sorted(p.name for p in path.iterdir()))}")
