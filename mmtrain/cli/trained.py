"""``mmtrain predict``, ``eval`` and ``export``: what a trained model is used for."""

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

#: Of the numbers in a forecast: as many digits as float64 always keeps.
_DIGITS = "%.15g"


def predict_command(
    model: Annotated[str, typer.Argument(help="A run folder, or a folder written by `mmtrain export`.")],
    files: Annotated[
        list[Path], typer.Argument(help="Image files, or one CSV or parquet file of a series, or a prepared panel.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the CSV and a forecast's PNG (forecasts: default here).")
    ] = None,
    back: Annotated[int, typer.Option(help="Forecast from so many rows before the end; they are the truth.")] = 0,
    missing: Annotated[
        str, typer.Option(help="Holes in the series: error, ffill, interpolate, zero or mask.")
    ] = "error",
    duplicates: Annotated[
        str | None,
        typer.Option(
            help="Repeated times in the series: error, keep_first, keep_last, mean, keep_all (default: the run's)."
        ),
    ] = None,
    separator: Separator = None,
    decimal: Decimal = None,
    time_format: TimeFormat = None,
    checkpoint: Checkpoint = SELECTED,
) -> None:
    """Classify images (top 5 with probabilities), or forecast a series (CSV and a picture)."""
    trained = load_trained(model, checkpoint)
    for path in files:
        if not path.exists():
            raise UserError(f"{path}: there is no such file")
    if trained.config.task.kind == "classification":
        _classify(trained, files, out)
    else:
        if len(files) != 1:
            raise UserError(f"a forecast takes one file, not {len(files)}")
        form = TableFormat(separator, decimal, time_format, duplicates)
        _forecast(trained, files[0], out or Path(), back, missing, form)


def _classify(trained: TrainedModel, files: list[Path], out: Path | None) -> None:
    """Print the rankings; with ``out`` also write them to ``classes.csv`` there."""
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
    made: Forecast | PanelForecast
    if path.is_dir():
        made = forecast_panel(trained, path, back, missing)
        left_out = f" ({made.left_out} too short for the look-back)" if made.left_out else ""
        name, what = path.resolve().name, f"{len(made.ids)} series{left_out}"
    else:
        made = forecast(trained, path, back, missing, form)
        name, what = path.stem, f"{len(made.columns)} variates"
    stem = out / f"{name}_forecast"
    with os_errors(f"--out {out}: cannot be written"):
        out.mkdir(parents=True, exist_ok=True)
        made.table().to_csv(f"{stem}.csv", index=False, float_format=_DIGITS)
    picture = Path(f"{stem}.png")
    drawn = f", {picture}" if try_to_draw(picture, lambda: made.draw(picture)) else ""
    print(f"{made.values.shape[-2]} steps of {what}: {stem}.csv{drawn}")
    if made.truth is not None and np.isfinite(made.truth).any():
        errors = np.nanmean(np.abs(made.values - made.truth).reshape(-1, len(made.columns)), axis=0)
        for column, mean in zip(made.columns, errors, strict=True):
            print(f"  mean absolute error  {mean:10.4g}  {column}")


def eval_command(
    run: Run,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="val or test.")] = "test",
    checkpoint: Checkpoint = SELECTED,
) -> None:
    """Measure a trained run on a whole split of its data (overrides such as data.root=… may move the data)."""
    trained = load_trained(run, checkpoint)
    changed = [item for item in overrides or () if not item.startswith(("data.", "eval.", "device", "threads"))]
    if changed:
        raise UserError(f"eval takes overrides of data, eval, device and threads only, not {', '.join(changed)}")
    config = load_config(trained.folder / "config.yaml", overrides or ())
    set_threads(config.threads)
    task = build_task(config)
    task.check_assets(trained.assets, trained.folder)
    sources = {"train": task.train, "val": task.val, "test": task.test}
    source = sources.get(split)
    if source is None:
        there = ", ".join(name for name, found in sources.items() if found is not None)
        raise UserError(f"--split {split}: this run has no such split (it has {there})")
    cuda = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    if split == "train":
        raise UserError("--split train: training samples are augmented; give val or test")
    found = evaluate(task, trained.model.to(device), source, config, Ranks(0, 1, device))
    assert found is not None  # it is given up only where a rank is asked to stop
    print(json.dumps(found, indent=1))
    wrong = [name for name, value in found.items() if not math.isfinite(value)]
    if wrong:
        raise UserError(
            f"{run}: {', '.join(wrong)} not finite: the weights diverged in training; use another checkpoint"
        )


def export_command(
    run: Run,
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[
        str, typer.Option(help="safetensors, onnx or torch (a program without mmtrain).")
    ] = "safetensors",
    checkpoint: Checkpoint = SELECTED,
) -> None:
    """Write a trained model, with the configuration and what prediction needs beside it."""
    path = export_trained(load_trained(run, checkpoint), out, format)
    print(f"{path}: {', '.join(sorted(p.name for p in path.iterdir()))}")
