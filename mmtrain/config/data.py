"""The sections of the data sources."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from mmtrain.config.registry import Registry
from mmtrain.config.section import Section, require


class DataConfig(Section):
    """Keys of every data source."""

    prefix: ClassVar[str] = "data."
    kind: str = Field("", description="The data source.")
    workers: int = Field(
        0, ge=0, description="Data-loading processes per rank. The results do not depend on their number."
    )
    shuffle_window: int = Field(8, ge=1, description="Number of shards shuffled together.")
    faults: Literal["stop", "skip"] = Field(
        "stop",
        description="Reaction to a fault (a damaged image or shard, a worker that dies). stop: end the run. skip: leave"
        " the samples out, count them and list them in the report.",
    )
    max_faults: float = Field(
        0.001, ge=0, le=1, description="Largest fraction of a split that faults=skip may leave out."
    )
    accept_changes: bool = Field(
        False, description="Resume a run although its training data has changed; the journal records the changes."
    )


DATA: Registry[DataConfig] = Registry("data", "kind", DataConfig, "mmtrain.data")


class ImageDataConfig(DataConfig):
    """Keys of every source of images."""

    image_size: int = Field(224, ge=1, description="Height and width of the model input in pixels.")
    mean: list[float] = Field(
        [0.485, 0.456, 0.406], description="Mean subtracted from each channel. The default is ImageNet's."
    )
    std: list[Annotated[float, Field(gt=0)]] = Field(
        [0.229, 0.224, 0.225], description="Standard deviation that divides each channel. The default is ImageNet's."
    )


class StoredImagesConfig(ImageDataConfig):
    """Keys of images stored in files below ``root``."""

    root: str = Field("", description="Folder that contains the splits.")
    train: str = Field("train", description="Name of the training split below root.")
    val: str = Field("val", description="Name of the validation split below root.")
    test: str | None = Field(None, description="Name of the test split below root; null: none.")
    augment: Literal["none", "light", "crop", "imagenet"] = Field(
        "imagenet",
        description="Augmentation of training images. light: small random affine maps; crop: random resized crop and"
        " flip; imagenet: crop, then auto_augment and random erasing.",
    )
    crop_pct: float = Field(
        0.875, gt=0, le=1, description="Evaluation: side of the centre crop as a fraction of the resized image."
    )
    hflip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    auto_augment: str = Field("rand-m9-mstd0.5-inc1", description='AutoAugment policy in timm\'s notation; "": none.')
    re_prob: float = Field(0.25, ge=0, le=1, description="Probability of random erasing.")


@DATA.section("shards")
class ShardsDataConfig(StoredImagesConfig):
    """WebDataset tar shards in ``root``/{train,val,test}.

    ``root`` may be a URL (``https://...``, ``s3://...``). A split may be a brace pattern of shards or folders.
    """

    kind: str = "shards"
    cache: str | None = Field(
        None, description="Folder for shards fetched from a URL; null: `~/.cache/mmtrain/shards`."
    )
    cache_gb: float = Field(200.0, gt=0, description="Maximum size of this cache in gigabytes per node.")


@DATA.section("synthetic")
class SyntheticDataConfig(ImageDataConfig):
    """Generated images with class-dependent patterns, to try a configuration without its data."""

    kind: str = "synthetic"
    length: int = Field(2048, ge=1, description="Number of training images.")
    val_length: int = Field(512, ge=1, description="Number of validation images.")


@DATA.section("series")
class SeriesDataConfig(DataConfig):
    """A table (CSV or parquet) with one multivariate series."""

    kind: str = "series"
    path: str = Field("", description="Path of a file, or a name such as ETTh1 that is looked up below root.")
    root: str | None = Field(
        None, description="Folder in which names are looked up; null: `$MMTRAIN_DATA` if set, else `data/`."
    )
    split: Literal["etth", "ettm", "ratio", "date", "last"] = Field(
        "ratio",
        description="Division into train, validation and test. etth, ettm: that of the ETT benchmarks; ratio, date,"
        " last: by the key of that name below.",
    )
    ratios: list[float] = Field([0.7, 0.1, 0.2], description="split=ratio: fractions of train, validation and test.")
    dates: list[str] | None = Field(None, description="split=date: first dates of validation and of test.")
    last: list[int] | None = Field(
        None, description="split=last: number of time steps at the end for validation and for test, such as [28, 28]."
    )
    columns: list[str] | None = Field(None, description="Columns to use as variates, in this order; null: all.")
    time_column: str | None = Field(
        None,
        description="Column that contains the times. null: the first column named date, datetime, timestamp or time,"
        " else the first column if it contains dates; none: the table has no times.",
    )
    separator: str | None = Field(
        None, description="Field separator of a CSV: a character, or comma, semicolon, tab, pipe; null: detected."
    )
    decimal: Literal["point", "comma", ".", ","] | None = Field(
        None, description="Decimal mark of a CSV; null: detected."
    )
    time_format: str | None = Field(
        None,
        description="Format of the times: dmy, mdy or ymd; codes such as `%d/%m/%Y %H:%M`; or s, ms, us, ns for"
        " numbers since 1970. null: detected from the whole column.",
    )
    duplicates: Literal["error", "keep_first", "keep_last", "mean", "keep_all"] = Field(
        "error",
        description="Treatment of rows with the same time: keep the first, the last, their mean or all. error: refuse"
        " them, unless they are adjacent.",
    )
    missing: Literal["error", "ffill", "interpolate", "zero", "mask"] = Field(
        "error",
        description="Treatment of missing values: refuse (error), fill (ffill, interpolate, zero) or mask. With mask"
        " the model receives a mask of the missing values, and missing targets are excluded from loss and metrics.",
    )
    known: list[str] = Field(
        [], description="Columns known in advance, such as prices or events. They are inputs and are not forecast."
    )
    calendar: bool = Field(
        False, description="Add inputs computed from the times (hour, weekday, ...); constant ones are left out."
    )
    stride: int = Field(
        1, ge=1, description="Rows between the starts of two training windows. Evaluation uses every window."
    )

    @model_validator(mode="after")
    def _split_fits(self) -> Self:
        if self.split == "date":
            fits = self.dates is not None and len(self.dates) == 2
            require(fits, "data.dates", self.dates, "give the first dates of validation and of test")
        if self.split == "last":
            fits = self.last is not None and len(self.last) == 2 and min(self.last) >= 0
            cure = "give the number of time steps for validation and for test, such as [28, 28]"
            require(fits, "data.last", self.last, cure)
        return self


@DATA.section("panel")
class PanelDataConfig(SeriesDataConfig):
    """Many series, in a folder written by ``mmtrain data prepare panel``.

    ``path`` is this folder or a name below ``root``. A sample is a window of one series, standardised with the training
    rows of that series. ``known`` and ``static`` select from the prepared columns.
    """

    kind: str = "panel"
    split: Literal["prepared", "ratio", "date", "last"] = Field(  # type: ignore[assignment]
        "prepared",
        description="Division of each series. prepared: the split chosen at preparation, whose scalers are stored.",
    )
    missing: Literal["error", "mask"] = Field(
        "error", description="Treatment of missing values: refuse (error) or mask. Filling is done at preparation."
    )
    static: list[str] = Field([], description="Columns that are constant within a series, used as static inputs.")

    @model_validator(mode="after")
    def _reads_no_table(self) -> Self:
        for key in ("separator", "decimal", "time_format", "duplicates"):
            cure = "a prepared panel ignores this key; give the option to `mmtrain data prepare panel` instead"
            require(getattr(self, key) == type(self).model_fields[key].default, f"data.{key}", getattr(self, key), cure)
        return self


@DATA.section("ffcv")
class FFCVDataConfig(StoredImagesConfig):
    """FFCV files ``root``/{train,val,test}.beton, written by ``mmtrain data prepare ffcv``.

    ``workers`` is the number of FFCV's threads. With ``augment=imagenet``, which FFCV cannot compile, it is the number
    of data-loading processes.
    """

    kind: str = "ffcv"
    os_cache: bool = Field(
        True, description="true: the operating system caches the file; false: FFCV reads it window by window."
    )

    @model_validator(mode="after")
    def _beton_fits(self) -> Self:
        cure = "FFCV reads local files only: give a folder, or use data.kind=shards"
        require("://" not in self.root, "data.root", self.root, cure)
        cure = "FFCV cannot skip an image that it cannot decode: use data.faults=stop, or data.kind=shards"
        require(self.faults == "stop", "data.faults", self.faults, cure)
        return self
