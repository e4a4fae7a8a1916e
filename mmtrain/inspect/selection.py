"""What a trained model selected: its steps Δ over one window of a series, or over one image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from mmtrain.config import RunConfig, TSM2Config
from mmtrain.errors import UserError
from mmtrain.inference import TrainedModel, classify, forecast
from mmtrain.inspect.steps import StepMap, step_maps
from mmtrain.tasks import build_task


@dataclass(frozen=True)
class WindowSelection:
    """The step maps of one look-back window.

    ``past`` (lookback, M) in the units of the data; ``time`` (lookback,): times, or row numbers where there are none;
    ``starts`` (patches,): the place in the window at which each patch begins.
    """

    maps: list[StepMap]
    columns: list[str]
    past: NDArray[np.float32]
    time: NDArray[Any]
    starts: NDArray[np.int64]


@dataclass(frozen=True)
class ImageSelection:
    """The step maps of one image; ``image`` (H, W, 3) or (H, W, 1) in 0..1, as the model saw it."""

    maps: list[StepMap]
    image: NDArray[np.float32]
    what: str


def window_selection(
    trained: TrainedModel, config: RunConfig | None = None, series: Path | None = None
) -> WindowSelection:
    """The selection in the last window of the test split, or at the end of the file ``series``.

    Args:
        config: the run's configuration with other data, where it is not ``trained.config``.

    Raises:
        UserError: for data that is not there or does not fit, or a model that makes no forecasts.
    """
    _check_kind(trained, "forecasting", "--image")
    model = cast(TSM2Config, trained.config.model)
    if series is not None:
        made: list[Any] = []
        missing = getattr(trained.config.data, "missing", "error")
        maps = step_maps(trained.model, lambda: made.append(forecast(trained, series, missing=missing)))
        found = made[0]
        rows = np.arange(-model.lookback, 0)
        time = rows if found.stamps is None else found.stamps[: model.lookback]
        return WindowSelection(maps, found.columns, found.past, time, _starts(model))
    task: Any = build_task(config or trained.config)
    last = np.array([len(task.test) - 1])
    batch = task.test.fetch(last, None)
    extra = {key: batch[key] for key in ("mask", "static", "known") if key in batch}
    maps = step_maps(trained.model, lambda: trained.model(batch["past"], **extra))
    data, source = task.series, task.test
    stamps = data.stamps_of(source, int(last[0]))
    time = (data.rows_of(source, int(last[0])) if stamps is None else stamps)[: model.lookback]
    past = data.scaler_of(source, int(last[0])).inverse(batch["past"][0].numpy())
    return WindowSelection(maps, data.columns, past, time, _starts(model))


def _starts(model: TSM2Config) -> NDArray[np.int64]:
    """Where the patches that lie in the look-back begin (those of auxiliary inputs come behind them)."""
    return np.arange(0, model.lookback - model.patch_size + 1, model.patch_stride)


@torch.no_grad()
def image_selection(
    trained: TrainedModel, config: RunConfig | None = None, image: Path | None = None
) -> ImageSelection:
    """The selection in the image file ``image``, or in the first test (else validation) image of the run's data.

    Args:
        config: the run's configuration with other data, where it is not ``trained.config``.

    Raises:
        UserError: for data that is not there or does not fit, or a model that takes no images.
    """
    _check_kind(trained, "classification", "--series")
    seen: list[torch.Tensor] = []
    hook = trained.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        if image is not None:
            maps = step_maps(trained.model, lambda: classify(trained, [image]))
            what = image.name
        else:
            task = build_task(config or trained.config)
            source, what = (
                (task.val, "first validation image") if task.test is None else (task.test, "first test image")
            )
            batch = source.fetch(np.array([0]), None)
            maps = step_maps(trained.model, lambda: trained.model(batch["image"]))
    finally:
        hook.remove()
    mean, std = (np.asarray(trained.assets[key], np.float32) for key in ("mean", "std"))
    pixels = seen[0][0].permute(1, 2, 0).numpy() * std + mean
    return ImageSelection(maps, pixels.clip(0, 1), what)


def _check_kind(trained: TrainedModel, kind: str, flag: str) -> None:
    if trained.config.task.kind != kind:
        raise UserError(f"{trained.folder} holds a model for {trained.config.task.kind}: give {flag} instead")
