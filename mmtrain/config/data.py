"""Where samples come from, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.models import require

_IMAGENET_MEAN = [0.485, 0.456, 0.406]
_IMAGENET_STD = [0.229, 0.224, 0.225]


@dataclass
class DataConfig:
    """Common to all kinds. ``workers`` are loader processes per rank: they never change the results.

    ``faults``: what cannot be used (a damaged image or shard, a worker that dies) makes the run ``stop``, or is
    counted, listed in the run's report and left out (``skip``), up to ``max_faults`` of the samples of a split.
    """

    kind: str = ""
    workers: int = 0
    shuffle_window: int = 8
    faults: str = "stop"
    max_faults: float = 0.001

    def __post_init__(self) -> None:
        require(self.workers >= 0, "data.workers", self.workers, "it must be 0 or more")
        require(self.shuffle_window >= 1, "data.shuffle_window", self.shuffle_window, "it must be at least 1 (shards)")
        require(self.faults in ("stop", "skip"), "data.faults", self.faults, "choose one of stop, skip")
        require(0 <= self.max_faults <= 1, "data.max_faults", self.max_faults, "it is a part of the samples, 0 to 1")


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
    """WebDataset tar shards under ``root``/{train,val,test}. ``augment``: none, light, crop or imagenet.

    ``root`` may be an address (``https://...``, ``s3://...``), the splits brace patterns of shards or of folders. What
    is fetched is kept in ``cache`` (None: ``~/.cache/mmtrain/shards``), up to ``cache_gb`` gigabytes a node.
    """

    kind: str = "shards"
    root: str = ""
    train: str = "train"
    val: str = "val"
    test: str | None = None
    augment: str = "imagenet"
    crop_pct: float = 0.875
    cache: str | None = None
    cache_gb: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "it must be above 0")
        kinds = ("none", "light", "crop", "imagenet")
        require(self.augment in kinds, "data.augment", self.augment, f"choose one of {', '.join(kinds)}")


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
}
