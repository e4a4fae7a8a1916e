"""Use a trained model: load it from a run folder or an export, evaluate it, predict with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mmtrain.config import RunConfig, from_yaml
from mmtrain.errors import UserError
from mmtrain.inference.pretrained import WEIGHTS, from_pretrained, save_pretrained
from mmtrain.models import build_model
from mmtrain.parallel.ranks import Ranks
from mmtrain.runs.folder import RunFolder
from mmtrain.train.checkpoint.store import CheckpointStore, load_state, verify
from mmtrain.train.checkpoint.tensor_files import read_weights


@dataclass
class TrainedModel:
    """A model in evaluation mode with what it needs to be used. ``step`` is None for an export."""

    model: nn.Module
    config: RunConfig
    assets: dict[str, Any]
    folder: Path
    step: int | None


def load_trained(folder: str | Path, checkpoint: str = "best") -> TrainedModel:
    """Load from a run folder, or from a folder that :func:`export` wrote.

    Args:
        checkpoint: ``best``, ``last`` or a step, for a run folder. Averaged weights are used where they were kept.

    Raises:
        UserError: when there is no model in ``folder``, or no such checkpoint.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return _load_export(folder)
    if any(folder.glob("model.*")) and not (folder / "checkpoints").is_dir():
        raise UserError(
            f"{folder} holds an export that runs without mmtrain: load it with onnxruntime or torch.export.load, or"
            " export the run again with --format safetensors"
        )
    run = RunFolder.existing(folder)
    config = run.config()
    model = build_model(config.model)
    path = _checkpoint(run, checkpoint)
    read_weights(model, path, averaged=config.train.ema_decay is not None)
    return TrainedModel(model.eval(), config, run.assets(), folder, load_state(path)["step"])


def _checkpoint(run: RunFolder, which: str) -> Path:
    alone = Ranks(0, 1, torch.device("cpu"))
    store = CheckpointStore(run.checkpoints, alone, clean=False)
    newest = store.newest()
    if newest is None:
        raise UserError(f"{run.path} has no checkpoint yet: train it first, or wait for its first evaluation")
    if which == "last":
        return newest
    if which != "best" and not which.isdigit():
        raise UserError(f"--checkpoint {which}: give best, last or a step")
    step = load_state(newest)["best_step"] if which == "best" else int(which)
    path = store.at(step) if step is not None else newest
    fault = verify(path)
    if fault:
        there = ", ".join(sorted(p.name for p in run.checkpoints.glob("step_*")))
        raise UserError(f"{path} cannot be used: {fault} (there are: {there}); choose with --checkpoint")
    return path


def _load_export(folder: Path) -> TrainedModel:
    assets = json.loads((folder / "assets.json").read_text())
    return TrainedModel(from_pretrained(folder), from_yaml(folder / "config.yaml"), assets, folder, None)


def export(trained: TrainedModel, out: str | Path) -> Path:
    """Write ``model.safetensors``, ``config.yaml`` and ``assets.json`` to the new folder ``out``.

    Raises:
        UserError: when ``out`` exists or cannot be written.
    """
    return save_pretrained(trained.model, trained.config, trained.assets, out)


@torch.no_grad()
def classify(trained: TrainedModel, paths: Sequence[Path], top: int = 5) -> list[list[tuple[str, float]]]:
    """The ``top`` classes and their probabilities for each image file.

    Raises:
        UserError: for a model that is no classifier, or a file that is no image.
    """
    from mmtrain.data.images.photo import decode
    from mmtrain.data.images.transforms import build_transform

    if trained.config.task.kind != "classification":
        raise UserError(f"{trained.folder} holds a model for {trained.config.task.kind}, which takes no images")
    assets = trained.assets
    transform = build_transform(
        False, assets["image_size"], mean=assets["mean"], std=assets["std"], crop_pct=assets["crop_pct"]
    )
    found = []
    for path in paths:
        try:
            image = decode(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or 'not an image that can be read'}") from None
        except ValueError as error:
            raise UserError(f"{path}: not an image that can be read ({error})") from None
        probabilities = trained.model(transform([image], None))[0].softmax(-1)
        values, indices = probabilities.topk(min(top, len(probabilities)))
        found.append([(assets["classes"][i], v) for v, i in zip(values.tolist(), indices.tolist(), strict=True)])
    return found


@dataclass(frozen=True)
class Forecast:
    """past (lookback, M), values (horizon, M), truth the same or None where not known, all in units of the data."""

    columns: list[str]
    past: NDArray[np.float32]
    values: NDArray[np.float32]
    truth: NDArray[np.float32] | None
    stamps: NDArray[np.datetime64] | None


@torch.no_grad()
def forecast(trained: TrainedModel, path: Path, back: int = 0, missing: str = "error") -> Forecast:
    """Forecast the series in ``path`` from ``back`` rows before its end; those rows, where known, are the truth.

    Columns that the model knows in advance must be given for the horizon too: in rows at the end of the file that leave
    the other columns empty, or with ``back``. ``missing``: as ``data.missing``.

    Raises:
        UserError: for a model that makes no forecasts, a file with too few rows, or other columns than those that the
            model was trained on.
    """
    from mmtrain.data.series.split import Scaler
    from mmtrain.data.series.table import read_table
    from mmtrain.inference.tables import known_until, observed

    if trained.config.task.kind != "forecasting":
        raise UserError(f"{trained.folder} holds a model for {trained.config.task.kind}, which makes no forecasts")
    if trained.config.data.kind == "panel":
        raise UserError(f"{trained.folder} was trained on a panel: give a folder made by mmtrain data prepare panel")
    known = trained.assets["columns"]
    chosen, beside = cast(Any, trained.config.data).columns, trained.assets.get("known", {"columns": []})
    try:
        table = read_table(
            path,
            columns=chosen,
            missing=missing,
            time_column=cast(Any, trained.config.data).time_column,
            known=beside["columns"],
        )
    except UserError as error:  # what is a key in training is a flag here
        raise UserError(str(error).replace("data.missing=", "--missing ")) from None
    _check_columns(path, list(table.columns), known)
    values = table.values[:, [list(table.columns).index(name) for name in known]]
    lookback, horizon = trained.assets["lookback"], trained.assets["horizon"]
    end = len(values) - back
    if back < 0 or end < lookback:
        raise UserError(
            f"{path} has {len(values)} rows: a look-back of {lookback} ending {back} rows before the end does not fit"
            " (see --back)"
        )
    scaler = Scaler.from_dict(trained.assets["scaler"])
    past = values[end - lookback : end]
    inputs = observed(scaler.transform(past), missing == "mask")
    if beside["columns"] or beside.get("calendar"):
        steps = cast(Any, trained.config.model).future_length or lookback + horizon
        inputs["known"] = known_until(table, beside, end + horizon, steps, len(known))
    made = trained.model(**inputs)[0].float().numpy()
    truth = values[end : end + horizon] if back else None
    if truth is not None and len(truth) < horizon:
        truth = np.concatenate([truth, np.full((horizon - len(truth), len(known)), np.nan, np.float32)])
    return Forecast(list(known), past, scaler.inverse(made), truth, _stamps(table.stamps, end, lookback, horizon))


def _check_columns(path: Path, there: list[str], known: list[str]) -> None:
    extra = [name for name in there if name not in known]
    lacking = [name for name in known if name not in there]
    if extra or lacking:
        parts = [f"it lacks {', '.join(lacking[:8])}"] if lacking else []
        parts += [f"it has {', '.join(extra[:8])}{' …' if len(extra) > 8 else ''} besides"] if extra else []
        raise UserError(
            f"{path}: its {len(there)} variates are not the {len(known)} that the model was trained on"
            f" ({', '.join(known[:8])}): {'; '.join(parts)}. Give a file with just those columns, or train on this one"
        )


def _stamps(
    stamps: NDArray[np.datetime64] | None, end: int, lookback: int, horizon: int
) -> NDArray[np.datetime64] | None:
    """Times of the look-back and the horizon; beyond the table they go on with its median step."""
    if stamps is None or len(stamps) < 2:
        return None
    step = np.median(np.diff(stamps).astype(np.int64)).astype(np.int64)
    ahead = stamps[end - 1] + (np.arange(1, horizon + 1) * step).astype(np.diff(stamps).dtype)
    return np.concatenate([stamps[end - lookback : end], ahead])
