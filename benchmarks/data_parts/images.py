"""Comparison of mmtrain's tar shards with usual image pipelines: same images, augmentation and number of workers.

All produce float32 batches of 224 × 224: decode, random resized crop, flip, normalise. "webdataset" is its usual
pipeline with Pillow and torchvision's transforms, "ImageFolder" that of torchvision with a DataLoader. "bare" is
mmtrain's decoding and augmentation of images in memory, in one process and without a loader. The pipelines run
continuously and take turns; a ratio is that of one round. The unit is images per second and core, from the processor
time of the training process and all workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler
from trainer_parts.figure import Figure, median_of

from data_parts.litdata_loader import MEAN, SIZE, STD, is_here, open_litdata
from data_parts.photos import HIGH, WIDE, make_images
from mmtrain.data.core.loader import train_batches
from mmtrain.data.core.order import mix64
from mmtrain.data.images.photo import Photo
from mmtrain.data.images.shards import ImageShards
from mmtrain.data.images.transforms import build_transform
from mmtrain.data.prepare.output import Origin
from mmtrain.data.prepare.writer import Item, write_dataset
from mmtrain.torchvision_compat import ensure_torchvision

PART = "images"
BATCH, CLASSES = 64, 10

Batches = Iterator[torch.Tensor]  # endless


def measure(folder: Path, *, source: Path | None, count: int, rounds: int, workers: int) -> Iterator[Figure]:
    """Yield the ratios for photos of 500 × 375, and for the images in ``source`` in their original size."""
    kinds = {f"photos of {WIDE} × {HIGH}": make_images(count, source)}
    if source is not None:
        kinds["small images as they are"] = _as_they_are(source, count)
    for number, (kind, files) in enumerate(kinds.items()):
        yield from _beside(folder / str(number), kind, files, rounds, workers)


def _as_they_are(source: Path, count: int) -> list[bytes]:
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [found[number * len(found) // count].read_bytes() for number in range(count)]


def _beside(folder: Path, kind: str, files: list[bytes], rounds: int, workers: int) -> Iterator[Figure]:
    contenders = _contenders(folder, files, workers)
    spent: dict[str, list[float]] = {name: [] for name in contenders}
    steps = len(files) // BATCH
    for batches in contenders.values():
        _take(batches, steps)  # start the workers, and bring the files into memory
    for turn in range(rounds):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            begun = _processor_seconds()
            _take(contenders[name], steps)
            spent[name].append((_processor_seconds() - begun) / (steps * BATCH))
    how = (
        f"{kind}, {sum(map(len, files)) / len(files) / 1e3:.0f} kB each, median of {rounds} rounds of {steps} batches "
        f"of {BATCH}; {workers} workers"
    )
    for name, seconds in spent.items():
        figure = f"{kind}: {name}, per core"
        yield Figure(PART, figure, **median_of([1 / each for each in seconds]), unit="images/s", how=how)
    targets = {"webdataset": 1.5, "ImageFolder": 1.5, "bare": 0.9, "LitData": None}
    for name, target in targets.items():
        if name not in spent:
            continue
        ratios = [other / mmtrain for other, mmtrain in zip(spent[name], spent["ours"], strict=True)]
        yield Figure(
            PART, f"{kind}: ours / {name}", **median_of(ratios), unit="x", how=how, target=target, at_least=True
        )


def _take(batches: Batches, steps: int) -> None:
    """Read ``steps`` batches, then wait until the workers have filled their queues."""
    for images in islice(batches, steps):
        assert images.shape == (BATCH, 3, SIZE, SIZE)
        assert images.dtype == torch.float32
    # the queues were also full when this turn began
    quiet = _processor_seconds()
    while True:
        time.sleep(0.1)
        before, quiet = quiet, _processor_seconds()
        if quiet - before < 0.005:
            return


def _processor_seconds() -> float:
    """Return the processor time of this process and all its workers."""
    return time.process_time() + sum(
        int(Path(f"/proc/{child}/schedstat").read_text().split()[0]) / 1e9 for child in _children()
    )


def _children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def _contenders(folder: Path, files: list[bytes], workers: int) -> dict[str, Batches]:
    items = [Item(number % CLASSES, content=content) for number, content in enumerate(files)]
    shards = write_dataset(
        folder / "shards", {"train": items}, [str(n) for n in range(CLASSES)], Origin("benchmark"), {}, shard_size=128
    )
    for number, content in enumerate(files):
        target = folder / "folder" / str(number % CLASSES)
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number:06d}.jpg").write_bytes(content)
    found = {
        "ours": _ours(shards.out / "train", workers),
        "webdataset": _webdataset(shards.out / "train", workers),
        "ImageFolder": _image_folder(folder / "folder", workers),
        "bare": _bare(files),
    }
    return found | ({"LitData": _litdata(folder / "litdata", files, workers)} if is_here() else {})


def _ours(folder: Path, workers: int) -> Batches:
    source = ImageShards(folder, image_size=SIZE, train=True, augment="crop", mean=MEAN, std=STD)
    for batch in train_batches(source, seed=0, batch_size=BATCH, start=0, steps=10**6, workers=workers):
        yield batch["image"]


def _usual_transform() -> Any:
    ensure_torchvision()
    from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

    return Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)])


def _webdataset(folder: Path, workers: int) -> Batches:
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("pilrgb")
    dataset = dataset.to_tuple("jpg", "cls").map_tuple(_usual_transform(), int).repeat().batched(BATCH)
    for images, _ in webdataset.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield images


def _image_folder(folder: Path, workers: int) -> Batches:
    ensure_torchvision()
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(folder), _usual_transform())
    sampler = RandomSampler(dataset, replacement=True, num_samples=10**8)
    for images, _ in DataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=workers):
        yield images


def _litdata(folder: Path, files: list[bytes], workers: int) -> Batches:
    loader = open_litdata(folder, files, workers, BATCH)
    for _ in repeat(None):
        yield from (images for images, _ in loader if len(images) == BATCH)


def _bare(files: list[bytes]) -> Batches:
    transform = build_transform(True, SIZE, "crop", mean=MEAN, std=STD)
    keys = mix64(np.arange(BATCH))
    for _ in repeat(None):
        for begin in range(0, len(files) - BATCH + 1, BATCH):
            yield transform([Photo(content) for content in files[begin : begin + BATCH]], keys)
