"""How long the training split is and how large its samples are; from the data where it is at hand."""

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

#: ImageNet-1k's training split (ILSVRC 2012).
IMAGENET_SAMPLES = 1_281_167
#: An average JPEG of it, as published.
IMAGENET_BYTES = 110_000
#: Series of a table that is not at hand: those of the ETT benchmarks.
_VARIATES = 7


@dataclass(frozen=True)
class Dataset:
    """``samples``: None where nobody knows. ``origin``: where that number is from.

    ``stored``: bytes of a sample as it is read (``bytes_origin``: where that is from), ``decoded``: as it goes to the
    GPU, in ``form``. ``variates``: series of a window.
    """

    samples: int | None
    origin: str
    stored: float
    decoded: int
    bytes_origin: str
    variates: int = _VARIATES
    form: str = "float32"


def describe_dataset(config: RunConfig, samples: int | None = None) -> Dataset:
    """What is known of the training split of ``config``.

    Args:
        samples: its length, where the caller knows better.
    """
    data = config.data
    if samples is not None and samples < 1:
        raise UserError(f"--samples {samples}: give the training samples of an epoch, 1 or more")
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
        return Dataset(*_given(samples, data.length, "data.length"), 0, decoded, "made up, nothing is read")
    if not isinstance(data, ShardsDataConfig | FFCVDataConfig):
        raise UserError(f"data.kind is {data.kind!r}: the planner does not know how many samples it has or how large")
    if isinstance(data, ShardsDataConfig) and data.augment != "light":  # bytes, normalised on the device
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
            return Dataset(*_given(samples, len(beton), f"counted in {folder}"), size, decoded, f"of {folder}")
    elif data.root and folder.is_dir():
        skip = data.faults == "skip"
        indexes = index_shards(find_shards(folder, missing=skip), skip=skip)
        found = sum(len(index) for index in indexes)
        size = sum(float(index.sizes.sum()) for index in indexes) / max(found, 1)
        return Dataset(*_given(samples, found, f"counted in {folder}"), size, decoded, f"of the shards in {folder}")
    if getattr(config.model, "num_classes", 0) == 1000:
        origin = f"ImageNet-1k's training split, assumed since there is no {folder}"
        given = _given(samples, IMAGENET_SAMPLES, origin)
    else:
        given = _given(samples, None, f"unknown, since there is no {folder}: give --samples")
    return Dataset(*given, IMAGENET_BYTES, decoded, "an average ImageNet JPEG, assumed")


def _series(config: RunConfig, data: SeriesDataConfig, samples: int | None) -> Dataset:
    model = config.model
    assert isinstance(model, ForecasterConfig)
    variates = len(data.columns) if data.columns else _VARIATES
    try:
        series = open_data(data, model)
        variates = len(series.columns)
        given = _given(samples, len(series.train), f"windows of {series.path}")
    except UserError as error:
        what = "table" if data.kind == "series" else data.kind
        why = f"unknown, since the {what} {data.path} cannot be used ({error}): give --samples"
        given = _given(samples, None, why)
    more = model.auxiliary
    window = 4 * variates * (model.lookback + model.horizon + more.steps * more.future + more.static)
    where = "in memory" if data.kind == "series" else "in memory-mapped files"
    return Dataset(*given, window, window, f"a window of {variates} series {where}", variates)
