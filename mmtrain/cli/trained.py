"""``mmtrain predict``, ``eval`` and ``export``: commands for trained models."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from mmtrain.cli.common import Checkpoint, Decimal, Overrides, Run, Separator, TimeFormat
from mmtrain.config import load_config
from mmtrain.data.core.counts import set_threads
from mmtrain.data.series.files import TableFormat
from mmtrain.errors import UserError, os_errors
from mmtrain.export import export_trained
from mmtrain.inference import TrainedModel, classify, forecast, forecast_panel, load_trained
from mmtrain.inference.panels import PanelForecast
from mmtrain.inference.predict import Forecast
from mmtrain.inference.trained import SELECTED
from mmtrain.parallel.ranks import Ranks
from mmtrain.plotting import try_to_draw
from mmtrain.tasks import build_task
from mmtrain.train.evaluate import evaluate

#: Format of forecast values: 15 significant digits, which float64 always represents.
_DIGITS = "%.15g"


def predict_command(
    model: Annotated[str, typer.Argument(help="Run folder, or folder written by `mmtrain export`.")],
    files: Annotated[
        list[Path], typer.Argument(help="Image files, or one table (CSV or parquet), or one prepared panel.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the CSV file and the plot (default: the current one for forecasts, else none)."),
    ] = None,
    back: Annotated[
        int, typer.Option(help="Forecast from this many rows before the end, and compare with these rows.")
    ] = 0,
    missing: Annotated[
        str, typer.Option(help="Treatment of missing values: error, ffill, interpolate, zero or mask.")
    ] = "error",
    duplicates: Annotated[
        str | None,
        typer.Option(
            help="Treatment of repeated times: error, keep_first, keep_last, mean, keep_all (default: the run's)."
        ),
    ] = None,
    separator: Separator = None,
    decimal: Decimal = None,
    time_format: TimeFormat = None,
    checkpoint: Checkpoint = SELECTED,
) -> None:
    """Classify images or forecast series.

    For images, print the five most probable classes. For a table or a panel, write the forecast as a CSV file and a
    plot.

    \b
    Examples:
      mmtrain predict runs/vim2_digits digit.png
      mmtrain predict runs/tsm2_etth1 ETTh1.csv --back 96    # forecast the last 96 rows and compare
    """
    trained = load_trained(model, checkpoint)
    for path in files:
        if not path.exists():
            raise UserError(f"{path}: no such file")
    if trained.config.task.kind == "classification":
        _classify(trained, files, out)
    else:
        if len(files) != 1:
            raise UserError(f"a forecast takes one file, but {len(files)} were given: run the command once per file")
        form = TableFormat(separator, decimal, time_format, duplicates)
        _forecast(trained, files[0], out or Path(), back, missing, form)


def _classify(trained: TrainedModel, files: list[Path], out: Path | None) -> None:
    """Print the most probable classes of each image. With ``out``, also write them to ``classes.csv`` there."""
    rankings = list(zip(files, classify(trained, files), strict=True))
    for path, ranking in rankings:
        print(path)
        for name, probability in ranking:
            print(f"  {probability:7.2%}  {name}")
    if out is None:
        return
    table = out / "classes.csv"
    with os_errors(f"--out {out}: cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerow(["file", "rank", "class", "probability"])
            for path, ranking in rankings:
                rows.writerows([path, rank, name, f"{p:.6g}"] for rank, (name, p) in enumerate(ranking, 1))
    print(f"written: {table}")


def _forecast(trained: TrainedModel, path: Path, out: Path, back: int, missing: str, form: TableFormat) -> None:
    result: Forecast | PanelForecast
    if path.is_dir():
        result = forecast_panel(trained, path, back, missing)
        left_out = f" ({result.left_out} left out: shorter than the lookback)" if result.left_out else ""
        name, size = path.resolve().name, f"{len(result.ids)} series{left_out}"
    else:
        result = forecast(trained, path, back, missing, form)
        name, size = path.stem, f"{len(result.columns)} variates"
    stem = out / f"{name}_forecast"
    with os_errors(f"--out {out}: cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        result.table().to_csv(f"{stem}.csv", index=False, float_format=_DIGITS)
    plot = Path(f"{stem}.png")
    drawn = f", {plot}" if try_to_draw(plot, lambda: result.draw(plot)) else ""
    print(f"{result.values.shape[-2]} time steps of {size}: {stem}.csv{drawn}")
    if result.truth is not None and np.isfinite(result.truth).any():
        errors = np.nanmean(np.abs(result.values - result.truth).reshape(-1, len(result.columns)), axis=0)
        for column, mean in zip(result.columns, errors, strict=True):
            print(f"  mean absolute error  {mean:10.4g}  {column}")


def eval_command(
    run: Run,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="Split to evaluate on: val or test.")] = "test",
    checkpoint: Checkpoint = SELECTED,
) -> None:
    """Evaluate a trained model on a whole split of its data and print the metrics as JSON.

    Overrides may only change data, eval, device and threads, for instance to read the data from another folder.

    \b
    Examples:
      mmtrain eval runs/my_run --split val
      mmtrain eval runs/my_run --checkpoint last data.root=/data/digits
    """
    trained = load_trained(run, checkpoint)
    changed = [item for item in overrides or () if not item.startswith(("data.", "eval.", "device", "threads"))]
    if changed:
        raise UserError(
            f"{', '.join(changed)}: mmtrain eval takes overrides of data, eval, device and threads only. Leave it out"
        )
    config = load_config(trained.folder / "config.yaml", overrides or ())
    set_threads(config.threads)
    task = build_task(config)
    task.check_assets(trained.assets, trained.folder)
    sources = {"train": task.train, "val": task.val, "test": task.test}
    source = sources.get(split)
    if source is None:
        available = ", ".join(name for name, found in sources.items() if found is not None and name != "train")
        raise UserError(f"--split {split}: this run has no such split. Choose one of: {available}")
    cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if split == "train":
        raise UserError("--split train: training samples are augmented. Choose val or test")
    found = evaluate(task, trained.model.to(device), source, config, Ranks(0, 1, device))
    assert found is not None  # None only after a request to stop
    print(json.dumps(found, indent=1))
    wrong = [name for name, value in found.items() if not math.isfinite(value)]
    if wrong:
        raise UserError(
            f"{run}: {', '.join(wrong)} not finite, because the weights diverged in training. Use another --checkpoint"
        )


def export_command(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    format: Annotated[
        str, typer.Option(help="safetensors, onnx, or torch (a torch.export program that runs without mmtrain).")
    ] = "safetensors",
    checkpoint: Checkpoint = SELECTED,
) -> None:
    """Export a trained model to a folder, with its configuration and everything that prediction needs.

    \b
    Examples:
      mmtrain export runs/my_run --out exported
      mmtrain export runs/my_run --out exported --format onnx
    """
    path = export_trained(load_trained(run, checkpoint), out, format)
    print(f"{path}: {', '.join(sorted(p.name for p in path.iterdir()))}")
