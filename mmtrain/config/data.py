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
class StoredImagesConfig(ImageDataConfig):
    """Images in files below ``root``: ``train``, ``val`` and, where there is one, ``test``.

    ``augment``: none, light, crop (random resized crop, and mirrored with probability ``hflip``) or imagenet (after
    that ``auto_augment`` in timm's notation, "" for none, and random erasing with ``re_prob``).
    """

    root: str = ""
    train: str = "train"
    val: str = "val"
    test: str | None = None
    augment: str = "imagenet"
    crop_pct: float = 0.875
    hflip: float = 0.5
    auto_augment: str = "rand-m9-mstd0.5-inc1"
    re_prob: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("none", "light", "crop", "imagenet")
        require(self.augment in kinds, "data.augment", self.augment, f"choose one of {', '.join(kinds)}")
        require(0 < self.crop_pct <= 1, "data.crop_pct", self.crop_pct, "it must be a part above 0 and up to 1")
        for key in ("hflip", "re_prob"):
            require(0 <= getattr(self, key) <= 1, f"data.{key}", getattr(self, key), "it must be from 0 to 1")


@dataclass
class ShardsDataConfig(StoredImagesConfig):
    """WebDataset tar shards under ``root``/{train,val,test}.

    ``root`` may be an address (``https://...``, ``s3://...``), the splits brace patterns of shards or of folders. What
    is fetched is kept in ``cache`` (None: ``~/.cache/mmtrain/shards``), up to ``cache_gb`` gigabytes a node.
    """

    kind: str = "shards"
    cache: str | None = None
    cache_gb: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "it must be above 0")


@dataclass
class FFCVDataConfig(StoredImagesConfig):
    """FFCV files ``root``/{train,val,test}.beton, made by ``mmtrain data prepare ffcv``.

    ``workers`` are FFCV's threads; with ``augment=imagenet``, which is not compiled, they are loader processes.
    ``os_cache``: leave it to the system what stays in memory, else read in windows.
    """

    kind: str = "ffcv"
    os_cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require("://" not in self.root, "data.root", self.root, "betons are read from a folder of this machine")
        cure = "an image of a beton that cannot be decoded stops the run: use stop, or data.kind=shards"
        require(self.faults == "stop", "data.faults", self.faults, cure)


@dataclass
class SyntheticDataConfig(ImageDataConfig):
    """Made-up images of class-dependent patterns: to try a configuration without its data."""

    kind: str = "synthetic"
    length: int = 2048
    val_length: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("length", "val_length"):
            require(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "it must be at least 1 (images)")


@dataclass
class SeriesDataConfig(DataConfig):
    """One table of a multivariate series, CSV or parquet.

    ``path`` is a file, or a name such as ``ETTh1`` looked for under ``root``, else ``$MMTRAIN_DATA``, else ``data/``.
    ``split``: ``etth``, ``ettm``, ``ratio`` (with ``ratios``), ``date`` (``dates``: the first of validation and of
    test) or ``last`` (``last``: the last steps of validation and of test). ``columns`` selects and orders the variates.

    ``known``: columns that are known in advance (prices, events): inputs, not forecast. ``calendar`` adds what the date
    says: hour, weekday, ..., as far as it varies. ``missing``: error, a fill (ffill, interpolate, zero), or mask: the
    model is told where values are missing, and holes in the targets count nowhere. ``stride``: a training window begins
    at every so many rows; evaluation takes every window.
    """

    kind: str = "series"
    path: str = ""
    root: str | None = None
    split: str = "ratio"
    ratios: list[float] = field(default_factory=lambda: [0.7, 0.1, 0.2])
    dates: list[str] | None = None
    last: list[int] | None = None
    columns: list[str] | None = None
    time_column: str | None = None
    missing: str = "error"
    known: list[str] = field(default_factory=list)
    calendar: bool = False
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        splits, fills = self._choices()
        require(self.split in splits, "data.split", self.split, f"choose one of {', '.join(splits)}")
        require(self.missing in fills, "data.missing", self.missing, f"choose one of {', '.join(fills)}")
        require(self.stride >= 1, "data.stride", self.stride, "it must be at least 1 (rows)")
        if self.split == "date":
            fits = self.dates is not None and len(self.dates) == 2
            require(fits, "data.dates", self.dates, "give the first date of validation and that of test")
        if self.split == "last":
            fits = self.last is not None and len(self.last) == 2 and min(self.last) >= 0
            require(fits, "data.last", self.last, "give the last steps of validation and of test, such as [28, 28]")

    def _choices(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What ``split`` and ``missing`` may be."""
        return ("etth", "ettm", "ratio", "date", "last"), ("error", "ffill", "interpolate", "zero", "mask")


@dataclass
class PanelDataConfig(SeriesDataConfig):
    """Many series, as ``mmtrain data prepare panel`` writes them: the folder ``path``, also looked for under ``root``.

    A sample is a window of one series, standardised by that series' training rows. ``split``: ``prepared`` (that of
    the preparation, whose scalers are at hand), ``ratio``, ``date`` or ``last``; each series is cut on its own.
    ``known`` and ``static`` choose among the columns that were prepared. ``missing``: error or mask (fills are a matter
    of preparing).
    """

    kind: str = "panel"
    split: str = "prepared"
    static: list[str] = field(default_factory=list)

    def _choices(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("prepared", "ratio", "date", "last"), ("error", "mask")


DATA: dict[str, type[DataConfig]] = {
    "shards": ShardsDataConfig,
    "synthetic": SyntheticDataConfig,
    "series": SeriesDataConfig,
    "panel": PanelDataConfig,
    "ffcv": FFCVDataConfig,
}
