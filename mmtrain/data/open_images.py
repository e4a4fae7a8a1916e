"""The images of a run: made up, tar shards or betons, as its configuration says."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from mmtrain.config.data import (
    FFCVDataConfig,
    ImageDataConfig,
    ShardsDataConfig,
    StoredImagesConfig,
    SyntheticDataConfig,
)
from mmtrain.data.beton.source import BetonImages, open_beton
from mmtrain.data.cache import default_cache
from mmtrain.data.images import ImageShards
from mmtrain.data.shards import is_address
from mmtrain.data.source import Source
from mmtrain.data.synthetic import SyntheticImages
from mmtrain.errors import UserError


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
