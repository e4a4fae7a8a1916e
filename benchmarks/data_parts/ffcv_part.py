"""Comparison of mmtrain's FFCV source with FFCV's loader and with LitData's loader, on the same images.

All produce float32 batches of 224 × 224: decode, random resized crop, flip, normalise. After a warm-up epoch, epochs of
the loaders alternate in one process, and a ratio is that of two successive epochs. FFCV's loader uses its decoder,
flip, NormalizeImage and ToTorchImage in random order; mmtrain uses its deterministic order. LitData (pip install
litdata) reads chunks of the same JPEG files in the same number of worker processes and uses Pillow and torchvision; it
is skipped if it is not installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trainer_parts.figure import Figure, median_of

from data_parts.litdata_loader import MEAN, SIZE, STD, is_here, open_litdata
from data_parts.photos import HIGH, WIDE, make_images
from mmtrain.data.core.loader import train_batches
from mmtrain.data.ffcv.format import require_ffcv, torch_threads_kept
from mmtrain.data.ffcv.source import open_beton
from mmtrain.data.prepare.ffcv import prepare_beton
from mmtrain.data.prepare.output import Origin
from mmtrain.data.prepare.writer import Item, write_dataset

_CLASSES = 10

Epoch = Callable[[], int]  # reads an epoch and returns its number of images


def measure(
    folder: Path, *, images: Path | None = None, threads: int = 2, pairs: int = 6, count: int = 1024, batch: int = 64
) -> Iterator[Figure]:
    """Yield the ratios, each from ``pairs`` pairs of epochs of ``count`` images. Writes to ``folder``."""
    require_ffcv()
    files = make_images(count, images)
    items = [Item(number % _CLASSES, content=content) for number, content in enumerate(files)]
    shards = write_dataset(
        folder / "shards", {"train": items}, [str(n) for n in range(_CLASSES)], Origin("benchmark"), {}, shard_size=128
    )
    beton = prepare_beton(shards.out, folder / "beton", workers=1).out / "train.beton"
    how = f"{count} JPEG files of {WIDE} × {HIGH}, {np.mean([len(f) for f in files]) / 1e3:.0f} kB, {threads} threads"
    ours = _ours(beton, threads, batch, count)
    yield from _compare("bare FFCV", ours, _bare(beton, threads, batch), pairs, how, target=0.95)
    if is_here():
        loader = open_litdata(folder / "litdata", files, threads, batch)
        yield from _compare("LitData", ours, lambda: _through(loader), pairs, how, target=None)


def _compare(name: str, ours: Epoch, other: Epoch, pairs: int, how: str, target: float | None) -> Iterator[Figure]:
    rates: dict[str, list[float]] = {"ours": [], name: []}
    for epoch in (ours, other):
        epoch()  # compile, and bring the file into memory
    for pair in range(pairs):
        both = [("ours", ours), (name, other)]
        for label, epoch in both if pair % 2 else both[::-1]:
            begin = time.perf_counter()
            seen = epoch()
            rates[label].append(seen / (time.perf_counter() - begin))
    for label, values in rates.items():
        yield Figure(
            "ffcv",
            f"{label}, compared with {name}" if label == "ours" else label,
            **median_of(values),
            unit="images/s",
            how=how,
        )
    ratios = [ours_rate / other_rate for ours_rate, other_rate in zip(*rates.values(), strict=True)]
    yield Figure("ffcv", f"ours / {name}", **median_of(ratios), unit="x", how=how, target=target, at_least=True)


def _through(batches: Iterable[Any]) -> int:
    """Read all batches, check their shape, and return the number of images."""
    seen = 0
    for batch in batches:
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert images.dtype == torch.float32
        seen += len(images)
    return seen


def _ours(beton: Path, threads: int, batch: int, count: int) -> Epoch:
    source = open_beton(beton, image_size=SIZE, train=True, augment="crop", mean=MEAN, std=STD)
    position = 0

    def epoch() -> int:
        nonlocal position
        batches = train_batches(
            source, seed=0, batch_size=batch, start=position, steps=count // batch, workers=threads, prefetch=3
        )
        position += count
        return _through(batches)

    return epoch


def _bare(beton: Path, threads: int, batch: int) -> Epoch:
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import NormalizeImage, RandomHorizontalFlip, ToTensor, ToTorchImage

    scale = [255 * np.array(values) for values in (MEAN, STD)]
    pixels = [
        RandomResizedCropRGBImageDecoder((SIZE, SIZE)),
        RandomHorizontalFlip(),
        NormalizeImage(*scale, np.float32),
    ]
    with torch_threads_kept():
        loader = Loader(
            str(beton),
            batch_size=batch,
            num_workers=threads,
            order=OrderOption.RANDOM,
            seed=0,
            pipelines={"image": [*pixels, ToTensor(), ToTorchImage()], "label": [IntDecoder(), ToTensor()]},
        )

    def epoch() -> int:
        with torch_threads_kept():
            return _through(loader)

    return epoch
