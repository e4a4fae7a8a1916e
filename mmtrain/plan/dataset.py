"""Number and size of the training samples, read from the data if it is on this machine, else assumed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mmtrain.config import (
    FFCVDataConfig,
    ForecasterConfig,
    RunConfig,
    SeriesDataConfig,
    ShardsDataConfig,
    SyntheticDataConfig,
)
from mmtrain.data.ffcv.format import read_beton
from mmtrain.data.images.shards import find_shards
from mmtrain.data.images.tar_index import index_shards
from mmtrain.data.open import open_data
from mmtrain.errors import UserError

#: Number of samples of the training split of ImageNet-1k (ILSVRC 2012).
IMAGENET_SAMPLES = 1_281_167
#: Published average size of its JPEG files, in bytes.
IMAGENET_BYTES = 110_000
#: Assumed number of variates of a table that is not on this machine: as in the ETT benchmarks.
_VARIATES = 7


@dataclass(frozen=True)
class Dataset:
    """Size of the training split.

    Attributes:
        samples: Number of training samples, or None if unknown.
        origin: Source of this number, for the user.
        stored: Bytes of a sample as it is read.
        decoded: Bytes of a sample as it is copied to the GPU.
        bytes_origin: Source of ``stored``, for the user.
        variates: Number of variates of a window.
        form: Data type of a decoded sample.
    """

    samples: int | None
    origin: str
    stored: float
    decoded: int
    bytes_origin: str
    variates: int = _VARIATES
    form: str = "float32"


def describe_dataset(config: RunConfig, samples: int | None = None) -> Dataset:
    """Return the size of the training split of ``config``.

    Args:
        config: The configuration of the run.
        samples: Number of training samples; replaces the number found in the data.

    Raises:
        UserError: If the model cannot train on this data, or ``samples`` is less than 1.
    """
    data = config.data
    if samples is not None and samples < 1:
        raise UserError(f"--samples {samples}: must be at least 1 (training samples per epoch)")
    if isinstance(data, SeriesDataConfig) != isinstance(config.model, ForecasterConfig):
        raise UserError(
            f"model '{config.model.name}' cannot train on data.kind={data.kind}: use data=series with tsm2, and"
            " data=shards, data=ffcv or data=synthetic with ViM2"
        )
    if isinstance(data, SeriesDataConfig):
        return _series(config, data, samples)
    channels = getattr(config.model, "in_channels", 3)
    size = getattr(data, "image_size", 224)
    decoded = 4 * channels * size * size
    if isinstance(data, SyntheticDataConfig):
        return Dataset(*_given(samples, data.length, "data.length"), 0, decoded, "synthetic, nothing is read")
    if not isinstance(data, ShardsDataConfig | FFCVDataConfig):
        raise UserError(f"data.kind={data.kind}: the plan supports shards, ffcv, synthetic, series and panel only")
    if isinstance(data, ShardsDataConfig) and data.augment != "light":  # copied as bytes and normalised on the device
        return replace(_images(config, data, samples, decoded // 4), form="uint8")
    return _images(config, data, samples, decoded)


def _given(samples: int | None, found: int | None, origin: str) -> tuple[int | None, str]:
    return (samples, "--samples") if samples is not None else (found, origin)


def _images(config: RunConfig, data: ShardsDataConfig | FFCVDataConfig, samples: int | None, decoded: int) -> Dataset:
    folder = Path(data.root) / data.train
    if isinstance(data, FFCVDataConfig):
        folder = folder.with_name(f"{folder.name}.beton")
        if data.root and folder.is_file():
            beton = read_beton(folder)
            size = beton.stored / len(beton)
            return Dataset(*_given(samples, len(beton), f"counted in {folder}"), size, decoded, f"mean of {folder}")
    elif data.root and folder.is_dir():
        skip = data.faults == "skip"
        indexes = index_shards(find_shards(folder, missing=skip), skip=skip)
        found = sum(len(index) for index in indexes)
        size = sum(float(index.sizes.sum()) for index in indexes) / max(found, 1)
        return Dataset(
            *_given(samples, found, f"counted in {folder}"), size, decoded, f"mean of the shards in {folder}"
        )
    if getattr(config.model, "num_classes", 0) == 1000:
        origin = f"training split of ImageNet-1k, assumed because {folder} does not exist"
        given = _given(samples, IMAGENET_SAMPLES, origin)
    else:
        given = _given(samples, None, f"unknown, because {folder} does not exist: give --samples")
    return Dataset(*given, IMAGENET_BYTES, decoded, "assumed: mean of ImageNet JPEG files")


def _series(config: RunConfig, data: SeriesDataConfig, samples: int | None) -> Dataset:
    model = config.model
    assert isinstance(model, ForecasterConfig)
    variates = len(data.columns) if data.columns else _VARIATES
    try:
        series = open_data(data, model)
        variates = len(series.columns)
        given = _given(samples, len(series.train), f"windows of {series.path}")
    except UserError as error:
        kind = "table" if data.kind == "series" else data.kind
        why = f"unknown, because the {kind} {data.path} cannot be used ({error}): give --samples"
        given = _given(samples, None, why)
    extra = model.auxiliary
    window = 4 * variates * (model.lookback + model.horizon + extra.steps * extra.future + extra.static)
    where = "in memory" if data.kind == "series" else "in memory-mapped files"
    return Dataset(*given, window, window, f"a window of {variates} variates {where}", variates)
