"""Opening the data of a configuration: images in up to three splits, or series divided into windows.

Each kind of data registers its function for the configuration section with ``@DATA.implements``. The function for
images takes the section, the number of classes and the seed. The function for series takes the section and the section
of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from mmtrain.config import DATA, ForecasterConfig, PanelDataConfig, SeriesDataConfig
from mmtrain.config.data import (
    FFCVDataConfig,
    ImageDataConfig,
    ShardsDataConfig,
    StoredImagesConfig,
    SyntheticDataConfig,
)
from mmtrain.data.core.source import Source
from mmtrain.data.download.fetch import data_root
from mmtrain.data.ffcv.source import BetonImages, open_beton
from mmtrain.data.images.cache import default_cache, is_address
from mmtrain.data.images.shards import ImageShards
from mmtrain.data.images.synthetic import SyntheticImages
from mmtrain.data.series.files import TableFormat
from mmtrain.data.series.panel_source import load_panel
from mmtrain.data.series.split import SplitRule
from mmtrain.data.series.table_source import load_series
from mmtrain.data.series.windows import ForecastingData, known_steps
from mmtrain.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Images(NamedTuple):
    """The splits of an image data set, and the names of its classes (None: unknown)."""

    train: Source
    val: Source
    test: Source | None
    classes: list[str] | None


def open_images(data: ImageDataConfig, num_classes: int, seed: int) -> Images:
    """Open the splits of the image data set that ``data`` describes.

    Raises:
        UserError: if the data is missing or damaged, or has a different number of classes.
    """
    return cast(Images, DATA.implementation(data)(data, num_classes, seed))


def open_data(data: SeriesDataConfig, model: ForecasterConfig) -> ForecastingData:
    """Open the series that ``data`` describes, divided into windows of ``model.lookback`` and ``model.horizon``.

    Raises:
        UserError: if the data is missing or damaged, or does not match the model.
    """
    return cast(ForecastingData, DATA.implementation(data)(data, model))


@DATA.implements(SyntheticDataConfig)
def _open_synthetic(data: SyntheticDataConfig, num_classes: int, seed: int) -> Images:
    made = SyntheticImages(num_classes, data.image_size, data.length, seed=seed)
    held_out = SyntheticImages(num_classes, data.image_size, data.val_length, seed=seed, first=data.length)
    return Images(made, held_out, None, None)


@DATA.implements(ShardsDataConfig)
def _open_shards(data: ShardsDataConfig, num_classes: int, seed: int) -> Images:
    def split(name: str, **options: Any) -> ImageShards:
        path = f"{data.root.rstrip('/')}/{name}"
        cache = default_cache(data.cache, data.cache_gb) if is_address(path) else None
        return ImageShards(path, skip=data.faults == "skip", cache=cache, **options)

    return _open_stored(data, num_classes, split, "images --root IMAGES")


@DATA.implements(FFCVDataConfig)
def _open_betons(data: FFCVDataConfig, num_classes: int, seed: int) -> Images:
    def split(name: str, **options: Any) -> BetonImages:
        path = f"{data.root.rstrip('/')}/{name}.beton"
        return open_beton(path, os_cache=data.os_cache, window=data.shuffle_window, **options)

    return _open_stored(data, num_classes, split, "ffcv --root SHARDS")


def _open_stored(
    data: StoredImagesConfig, num_classes: int, split: Callable[..., ImageShards | BetonImages], command: str
) -> Images:
    """Open the splits below ``data.root``. ``command`` is the `mmtrain data prepare` command that writes them."""
    if not data.root or (not is_address(data.root) and not Path(data.root).exists()):
        raise UserError(
            f"data.root: {f'there is no folder {data.root}' if data.root else 'it is not set'}. Create it with `mmtrain"
            f" data prepare {command} --out {data.root or 'FOLDER'}`, set data.root to an existing data set, or try"
            " the configuration on generated images with data=synthetic"
        )
    shared = ("image_size", "mean", "std", "crop_pct", "hflip", "auto_augment", "re_prob")
    options = {key: getattr(data, key) for key in shared}
    train = split(data.train, train=True, augment=data.augment, **options)
    found = train.num_classes
    if found is not None and found != num_classes:
        raise UserError(
            f"{data.root} has {found} classes, but model.num_classes is {num_classes}. Set model.num_classes={found}"
        )
    held_out = {**options, "train": False, "augment": "none"}
    val = split(data.val, **held_out)
    test = split(data.test, **held_out) if data.test else None
    for name, source in ((data.train, train), (data.val, val), (data.test, test)):
        if source is not None:
            _check_labels(source, num_classes)
            if different := other_classes(train.classes, source.classes):
                raise UserError(
                    f"{data.root}: the classes of {name} differ from those of {data.train}: {different}. Prepare both "
                    "splits from the same classes"
                )
    return Images(train, val, test, train.classes)


def _check_labels(source: ImageShards | BetonImages, num_classes: int) -> None:
    labels = source.labels
    if int(labels.max(initial=-1)) < num_classes:
        return
    bad, least, most = int(np.argmax(labels >= num_classes)), int(labels.min()), int(labels.max())
    cure = (
        "The labels begin at 1: prepare the data again with classes numbered from 0"
        if (least, most) == (1, num_classes)
        else f"The largest label is {most}: set model.num_classes={most + 1}, or prepare the data again"
    )
    raise UserError(
        f"{source.name_of(bad)}: label {labels[bad]}, but model.num_classes is {num_classes} and labels count from 0. "
        f"{cure}"
    )


def other_classes(known: Sequence[str] | None, found: Sequence[str] | None) -> str:
    """Describe how the class names ``found`` differ from ``known``. Return "" if they are equal or one is None."""
    if known is None or found is None or list(known) == list(found):
        return ""
    if len(known) != len(found):
        return f"{len(found)} classes instead of {len(known)}"
    different = [number for number, (one, other) in enumerate(zip(known, found, strict=True)) if one != other]
    shown = [f"class {number} is {found[number]!r} instead of {known[number]!r}" for number in different[:3]]
    return "; ".join(shown) + (f"; ... ({len(different)} differ)" if len(different) > 3 else "")


@DATA.implements(SeriesDataConfig)
def _open_table(data: SeriesDataConfig, model: ForecasterConfig) -> ForecastingData:
    return load_series(
        data.path,
        lookback=model.lookback,
        horizon=model.horizon,
        split=SplitRule.of(data),
        columns=data.columns,
        time_column=data.time_column,
        missing=data.missing,
        data_root=data_root(data.root),
        stride=data.stride,
        known=data.known,
        calendar=data.calendar,
        known_steps=known_steps(model.auxiliary.steps, model.lookback, model.horizon),
        form=TableFormat.of(data),
    )


@DATA.implements(PanelDataConfig)
def _open_panel(data: PanelDataConfig, model: ForecasterConfig) -> ForecastingData:
    return load_panel(data, model.lookback, model.horizon, model.auxiliary.steps, data_root(data.root))


def check_inputs(data: ForecastingData, model: ForecasterConfig, path: str) -> None:
    """Check that the model's numbers of known and static covariates match the data.

    Raises:
        UserError: if they differ. The message names the keys to set.
    """
    static, known = data.static, data.known
    widths = [name if width == 1 else f"{name} × {width}" for name, width in static.items()]
    wrong: list[str] = []
    for key, has, wanted, what in (
        ("future_features", model.auxiliary.future, len(known), _named("known", known)),
        ("static_features", model.auxiliary.static, sum(static.values()), _named("static", widths)),
    ):
        if has != wanted:
            wrong.append(f"model.{key} is {has}, but the data has {wanted} ({what}): set model.{key}={wanted}")
    if wrong:
        hint = "" if static or known else " (or select columns with data.known, data.static or data.calendar=true)"
        raise UserError(f"{path}: {'; '.join(wrong)}{hint}")


def _named(what: str, names: Sequence[str]) -> str:
    return f"{what}: {', '.join(names)}" if names else f"no {what} columns"
