"""Where samples come from, as data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmtrain.config.registry import Registry
from mmtrain.config.section import Section, require


class DataConfig(Section):
    """The keys that every kind of data has."""

    prefix: ClassVar[str] = "data."
    kind: str = Field("", description="The source of the samples.")
    workers: int = Field(0, ge=0, description="Loader processes of a rank. They never change the results.")
    shuffle_window: int = Field(8, ge=1, description="Shards whose samples are mixed with one another.")
    faults: Literal["stop", "skip"] = Field(
        "stop",
        description="What cannot be used (a damaged image or shard, a worker that dies) stops the run, or is counted,"
        " listed in the run's report and left out.",
    )
    max_faults: float = Field(0.001, ge=0, le=1, description="The part of a split that faults=skip may leave out.")
    accept_changes: bool = Field(
        False, description="Continue a run although its training data has changed; the journal records the changes."
    )


DATA: Registry[DataConfig] = Registry("data", "kind", DataConfig, "mmtrain.data")


class ImageDataConfig(DataConfig):
    """The keys of every source of images."""

    image_size: int = Field(224, ge=1, description="Side of the images in pixels.")
    mean: list[float] = Field([0.485, 0.456, 0.406], description="Subtracted from each channel (ImageNet's).")
    std: list[Annotated[float, Field(gt=0)]] = Field(
        [0.229, 0.224, 0.225], description="Divides each channel (ImageNet's)."
    )


class StoredImagesConfig(ImageDataConfig):
    """The keys of images in files below ``root``."""

    root: str = Field("", description="The folder of the splits.")
    train: str = Field("train", description="Training split, below root.")
    val: str = Field("val", description="Validation split, below root.")
    test: str | None = Field(None, description="Test split, below root.")
    augment: Literal["none", "light", "crop", "imagenet"] = Field(
        "imagenet",
        description="crop: random resized crop, mirrored with probability hflip; imagenet: after that auto_augment and"
        " random erasing.",
    )
    crop_pct: float = Field(0.875, gt=0, le=1, description="The part of an evaluated image that the crop keeps.")
    hflip: float = Field(0.5, ge=0, le=1, description="Probability of mirroring.")
    auto_augment: str = Field("rand-m9-mstd0.5-inc1", description='Policy in timm\'s notation; "" for none.')
    re_prob: float = Field(0.25, ge=0, le=1, description="Probability of random erasing.")


@DATA.section("shards")
class ShardsDataConfig(StoredImagesConfig):
    """WebDataset tar shards under ``root``/{train,val,test}.

    ``root`` may be an address (``https://...``, ``s3://...``), the splits brace patterns of shards or of folders.
    """

    kind: str = "shards"
    cache: str | None = Field(
        None, description="Where shards fetched from an address are kept; null: `~/.cache/mmtrain/shards`."
    )
    cache_gb: float = Field(200.0, gt=0, description="Size of the cache in gigabytes a node.")


@DATA.section("synthetic")
class SyntheticDataConfig(ImageDataConfig):
    """Made-up images of class-dependent patterns: to try a configuration without its data."""

    kind: str = "synthetic"
    length: int = Field(2048, ge=1, description="Training images.")
    val_length: int = Field(512, ge=1, description="Validation images.")


@DATA.section("series")
class SeriesDataConfig(DataConfig):
    """One table of a multivariate series, CSV or parquet."""

    kind: str = "series"
    path: str = Field("", description="A file, or a name such as ETTh1 looked for under root.")
    root: str | None = Field(None, description="Where names are looked for; null: `$MMTRAIN_DATA`, else `data/`.")
    split: Literal["etth", "ettm", "ratio", "date", "last"] = Field(
        "ratio", description="How train, validation and test are cut: as the ETT benchmarks, or by the keys below."
    )
    ratios: list[float] = Field([0.7, 0.1, 0.2], description="split=ratio: the parts of train, validation and test.")
    dates: list[str] | None = Field(None, description="split=date: the first dates of validation and of test.")
    last: list[int] | None = Field(None, description="split=last: the last steps of validation and of test.")
    columns: list[str] | None = Field(None, description="Selects and orders the variates; null: all columns.")
    time_column: str | None = Field(
        None,
        description="The column of the dates; null: the first named date, datetime, timestamp or time, or else"
        " the first column if it holds dates; none: no times.",
    )
    separator: str | None = Field(
        None, description="Between the fields of a CSV: a character, or comma, semicolon, tab, pipe; null: found out."
    )
    decimal: Literal["point", "comma", ".", ","] | None = Field(
        None, description="The decimal mark of a CSV; null: found out."
    )
    time_format: str | None = Field(
        None,
        description="How dates are written: dmy, mdy or ymd, codes such as `%d/%m/%Y %H:%M`, or s, ms, us, ns for"
        " numbers since 1970; null: found out from the whole column.",
    )
    duplicates: Literal["error", "keep_first", "keep_last", "mean", "keep_all"] = Field(
        "error",
        description="Several rows with one time become one row, or all stay as they come. error: they stay if they are"
        " neighbours, otherwise they are refused.",
    )
    missing: Literal["error", "ffill", "interpolate", "zero", "mask"] = Field(
        "error",
        description="Missing values are an error, filled, or masked: with mask the model is told where values are"
        " missing, and holes in the targets count nowhere.",
    )
    known: list[str] = Field([], description="Columns known in advance (prices, events): inputs that are not forecast.")
    calendar: bool = Field(False, description="Add what the date says (hour, weekday, ...), as far as it varies.")
    stride: int = Field(1, ge=1, description="Rows from one training window to the next; evaluation takes every one.")

    @model_validator(mode="after")
    def _split_fits(self) -> Self:
        if self.split == "date":
            fits = self.dates is not None and len(self.dates) == 2
            require(fits, "data.dates", self.dates, "give the first date of validation and that of test")
        if self.split == "last":
            fits = self.last is not None and len(self.last) == 2 and min(self.last) >= 0
            require(fits, "data.last", self.last, "give the last steps of validation and of test, such as [28, 28]")
        return self


@DATA.section("panel")
class PanelDataConfig(SeriesDataConfig):
    """Many series, as ``mmtrain data prepare panel`` writes them: the folder ``path``, also looked for under ``root``.

    A sample is a window of one series, standardised by that series' training rows. ``known`` and ``static`` choose
    among the columns that were prepared.
    """

    kind: str = "panel"
    split: Literal["prepared", "ratio", "date", "last"] = Field(  # type: ignore[assignment]
        "prepared", description="How each series is cut. prepared: as in the preparation, whose scalers are at hand."
    )
    missing: Literal["error", "mask"] = Field("error", description="As for a table; fills are a matter of preparing.")
    static: list[str] = Field([], description="Columns that are constant within a series.")

    @model_validator(mode="after")
    def _reads_no_table(self) -> Self:
        for key in ("separator", "decimal", "time_format", "duplicates"):
            cure = "a panel is read when it is prepared: give this to `mmtrain data prepare panel`"
            require(getattr(self, key) == type(self).model_fields[key].default, f"data.{key}", getattr(self, key), cure)
        return self


@DATA.section("ffcv")
class FFCVDataConfig(StoredImagesConfig):
    """FFCV files ``root``/{train,val,test}.beton, made by ``mmtrain data prepare ffcv``.

    ``workers`` are FFCV's threads; with ``augment=imagenet``, which is not compiled, they are loader processes.
    """

    kind: str = "ffcv"
    os_cache: bool = Field(True, description="Leave it to the system what stays in memory, else read in windows.")

    @model_validator(mode="after")
    def _beton_fits(self) -> Self:
        require("://" not in self.root, "data.root", self.root, "betons are read from a folder of this machine")
        cure = "an image of a beton that cannot be decoded stops the run: use stop, or data.kind=shards"
        require(self.faults == "stop", "data.faults", self.faults, cure)
        return self
