"""Where samples come from, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.models import require

_IMAGENET_MEAN = [0.485, 0.456, 0.406]
_IMAGENET_STD = [0.229, 0.224, 0.225]


@dataclass
class DataConfig:
    """Common to all kinds. ``workers`` are loader processes per rank: they never change the results."""

    kind: str = ""
    workers: int = 0
    shuffle_window: int = 8

    def __post_init__(self) -> None:
        require(self.workers >= 0, "data.workers", self.workers, "it must be 0 or more")
        require(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "it must be at least 1 (shards)")


@dataclass
class ImageDataConfig(DataConfig):
    """What every source of images has."""

    image_size: int = 224
    mean: list[float] = field(default_factory=lambda: list(_IMAGENET_MEAN))
    std: list[float] = field(default_factory=lambda: list(_IMAGENET_STD))

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.image_size >= 1, "data.image_size", self.image_size, "it must be at least 1 (pixels)")


@dataclass
class ShardsDataConfig(ImageDataConfig):
    """WebDataset tar shards under ``root``/{train,val,test}. ``augment``: none, light or imagenet."""

    kind: str = "shards"
    root: str = ""
    train: str = "train"
    val: str = "val"
    test: str | None = None
    augment: str = "imagenet"
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("none", "light", "imagenet")
        require(self.augment in kinds, "data.augment", self.augment, f"choose one of {', '.join(kinds)}")


@dataclass
class FFCVDataConfig(ImageDataConfig):
    """FFCV files ``root``/{train,val,test}.beton, made by ``mmtrain data prepare ffcv``.

    ``augment``: none, light, crop (random resized crop and flip, all compiled) or imagenet (with ``auto_augment`` in
    timm's notation and ``re_prob``, random erasing, after it). ``workers`` are FFCV's threads; loader processes where
    the augmentation is not compiled. ``os_cache``: leave it to the system what stays in memory, else read in windows.
    """

    kind: str = "ffcv"
    root: str = ""
    train: str = "train"
    val: str = "val"
    test: str | None = None
    augment: str = "imagenet"
    crop_pct: float = 0.875
    hflip: float = 0.5
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    re_prob: float = 0.25
    os_cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("none", "light", "crop", "imagenet")
        require(self.augment in kinds, "data.augment", self.augment, f"choose one of {', '.join(kinds)}")
        require(0 < self.crop_pct <= 1, "data.crop_pct", self.crop_pct, "it must be a part above 0 and up to 1")
        for key in ("hflip", "re_prob"):
            require(0 <= getattr(self, key) <= 1, f"data.{key}", getattr(self, key), "it must be from 0 to 1")


@dataclass
class SyntheticDataConfig(ImageDataConfig):
    """Made-up images of class-dependent patterns: to try a configuration without its data."""

    kind: str = "synthetic"
    length: int = 2048
    val_length: int = 512


@dataclass
class SeriesDataConfig(DataConfig):
    """One table of a multivariate series, CSV or parquet.

    ``path`` is a file, or a name such as ``ETTh1`` looked for under ``root``, else ``$MMTRAIN_DATA``, else ``data/``.
    ``split``: ``etth``, ``ettm`` or ``ratio`` (with ``ratios``). ``columns`` selects and orders the variates.
    """

    kind: str = "series"
    path: str = ""
    root: str | None = None
    split: str = "ratio"
    ratios: list[float] = field(default_factory=lambda: [0.7, 0.1, 0.2])
    columns: list[str] | None = None
    time_column: str | None = None
    missing: str = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        splits, fills = ("etth", "ettm", "ratio"), ("error", "ffill", "interpolate", "zero")
        require(self.split in splits, "data.split", self.split, f"choose one of {', '.join(splits)}")
        require(self.missing in fills, "data.missing", self.missing, f"choose one of {', '.join(fills)}")


DATA: dict[str, type[DataConfig]] = {
    "shards": ShardsDataConfig,
    "synthetic": SyntheticDataConfig,
    "series": SeriesDataConfig,
    "ffcv": FFCVDataConfig,
}
