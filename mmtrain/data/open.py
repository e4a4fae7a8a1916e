"""The images of a run: made up, tar shards or betons, as its configuration says.

The data of a forecasting run: a table or a panel, as its configuration says.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmtrain.config import PanelDataConfig, SeriesDataConfig, TSM2Config
from mmtrain.config.data import (
    FFCVDataConfig,
    ImageDataConfig,
    ShardsDataConfig,
    StoredImagesConfig,
    SyntheticDataConfig,
)
from mmtrain.data.core.source import Source
from mmtrain.data.ffcv.source import BetonImages, open_beton
from mmtrain.data.images.cache import default_cache
from mmtrain.data.images.shards import ImageShards, is_address
from mmtrain.data.images.synthetic import SyntheticImages
from mmtrain.data.series.panel_source import load_panel
from mmtrain.data.series.split import SplitRule
from mmtrain.data.series.table_source import load_series
from mmtrain.data.series.windows import ForecastingData, known_steps
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


class Images(NamedTuple):
    """The splits of a dataset, and the names of its classes where it has them."""

    train: Source
    val: Source
    test: Source | None
    classes: list[str] | None


def open_images(data: ImageDataConfig, num_classes: int, seed: int) -> Images:
    """Open what ``data`` names.

    Raises:
        UserError: for data that is not there, is faulty, or has another number of classes.
    """
    if isinstance(data, SyntheticDataConfig):
        made = SyntheticImages(num_classes, data.image_size, data.length, seed=seed)
        held_out = SyntheticImages(num_classes, data.image_size, data.val_length, seed=seed, first=data.length)
        return Images(made, held_out, None, None)
    assert isinstance(data, StoredImagesConfig)
    if not data.root or (not is_address(data.root) and not Path(data.root).exists()):
        command = "ffcv --root SHARDS" if isinstance(data, FFCVDataConfig) else "images --root IMAGES"
        raise UserError(
            f"data.root: {f'there is no folder {data.root}' if data.root else 'it is not set'}. Make one with `mmtrain"
            f" data prepare {command} --out {data.root or 'FOLDER'}`, point data.root at yours, or try the"
            " configuration on made-up images with data=synthetic"
        )
    train = _split(data, data.train, train=True)
    found = train.num_classes
    if found is not None and found != num_classes:
        raise UserError(
            f"{data.root} has {found} classes, but model.num_classes is {num_classes}: set model.num_classes={found}"
        )
    test = _split(data, data.test, train=False) if data.test else None
    return Images(train, _split(data, data.val, train=False), test, train.classes)


def _split(data: StoredImagesConfig, name: str, *, train: bool) -> ImageShards | BetonImages:
    options: dict[str, Any] = {
        "image_size": data.image_size,
        "train": train,
        "augment": data.augment if train else "none",
        "mean": data.mean,
        "std": data.std,
        "crop_pct": data.crop_pct,
        "hflip": data.hflip,
        "auto_augment": data.auto_augment,
        "re_prob": data.re_prob,
    }
    path = f"{data.root.rstrip('/')}/{name}"
    if isinstance(data, FFCVDataConfig):
        return open_beton(f"{path}.beton", os_cache=data.os_cache, window=data.shuffle_window, **options)
    assert isinstance(data, ShardsDataConfig)
    cache = default_cache(data.cache, data.cache_gb) if is_address(path) else None
    return ImageShards(path, skip=data.faults == "skip", cache=cache, **options)


def open_data(data: SeriesDataConfig, model: TSM2Config) -> ForecastingData:
    """Open what ``data`` names, cut into windows of ``model.lookback`` and ``model.horizon``.

    Raises:
        UserError: for data that is not there, is faulty, or does not fit.
    """
    root = data.root or os.environ.get("MMTRAIN_DATA") or "data"
    if isinstance(data, PanelDataConfig):
        return load_panel(data, model.lookback, model.horizon, model.future_length, root)
    return load_series(
        data.path,
        lookback=model.lookback,
        horizon=model.horizon,
        split=SplitRule.of(data),
        columns=data.columns,
        time_column=data.time_column,
        missing=data.missing,
        data_root=root,
        stride=data.stride,
        known=data.known,
        calendar=data.calendar,
        known_steps=known_steps(model.future_length, model.lookback, model.horizon),
    )


def check_inputs(data: ForecastingData, model: TSM2Config, path: str) -> None:
    """Does the model take what the data gives?

    Raises:
        UserError: with the keys to set.
    """
    static, known = data.static, data.known
    wrong: list[str] = []
    for key, has, wanted, what in (
        ("future_features", model.future_features, len(known), _named("known in advance", known)),
        ("static_features", model.static_features, sum(static.values()), _named("static", _widths(static))),
    ):
        if has != wanted:
            wrong.append(f"model.{key} is {has}, but the data gives {wanted} ({what}): set model.{key}={wanted}")
    if wrong:
        hint = "" if static or known else " (or name columns with data.known, data.static or data.calendar=true)"
        raise UserError(f"{path}: {'; '.join(wrong)}{hint}")


def _widths(static: dict[str, int]) -> list[str]:
    return [name if width == 1 else f"{name} × {width}" for name, width in static.items()]


def _named(what: str, names: Sequence[str]) -> str:
    return f"{what}: {', '.join(names)}" if names else f"nothing {what}"
