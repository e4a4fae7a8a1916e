"""Our path from tar shards beside the usual ones, on the same images, with the same augmentation and workers.

All make float32 batches of 224 × 224: decode, random resized crop, flip, normalise. "webdataset" is its usual pipeline
with Pillow and torchvision's transforms, "ImageFolder" torchvision's with a DataLoader. "bare" is our decoding and
augmentation of images in memory, in one process and without any loader. One epoch of each comes after the other, in
rounds, and a ratio is that of one round. What counts is processor time, of the training process and of all workers:
images a second of one core.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from trainer_parts.figure import Figure, median_of

from data_parts.photos import HIGH, WIDE, make_images
from mmtrain.compat import ensure_torchvision
from mmtrain.data.images import ImageShards
from mmtrain.data.loader import train_batches
from mmtrain.data.order import mix64
from mmtrain.data.photo import Photo
from mmtrain.data.prepare.writer import Item, write_dataset
from mmtrain.data.transforms import build_transform

PART = "images"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZE, BATCH, CLASSES = 224, 64, 10

Epoch = Callable[[], int]  # reads an epoch, and says how many images that was


def measure(folder: Path, *, source: Path | None, count: int, rounds: int, workers: int) -> Iterator[Figure]:
    """The ratios for photos of 500 × 375 and, where ``source`` has images, for those as they are."""
    kinds = {f"photos of {WIDE} × {HIGH}": make_images(count, source)}
    if source is not None:
        kinds["small images as they are"] = _as_they_are(source, count)
    for number, (kind, files) in enumerate(kinds.items()):
        yield from _beside(folder / str(number), kind, files, rounds, workers)


def _as_they_are(source: Path, count: int) -> list[bytes]:
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [found[number * len(found) // count].read_bytes() for number in range(count)]


def _beside(folder: Path, kind: str, files: list[bytes], rounds: int, workers: int) -> Iterator[Figure]:
    epochs = _contenders(folder, files, workers)
    spent: dict[str, list[float]] = {name: [] for name in epochs}
    for epoch in epochs.values():
        epoch()  # reads the files into memory, imports what is needed
    for turn in range(rounds):
        names = list(epochs)[:: 1 if turn % 2 else -1]
        for name in names:
            begun = _processor_seconds()
            seen = epochs[name]()
            spent[name].append((_processor_seconds() - begun) / seen)
    how = (
        f"{kind}, {sum(map(len, files)) / len(files) / 1e3:.0f} kB each, {len(files)} an epoch, median of {rounds} "
        f"rounds; {workers} workers"
    )
    for name, seconds in spent.items():
        figure = f"{kind}: {name}, a core"
        yield Figure(PART, figure, **median_of([1 / each for each in seconds]), unit="images/s", how=how)
    for name, target in (("webdataset", 1.5), ("ImageFolder", 1.5), ("bare", 0.9)):
        ratios = [theirs / ours for theirs, ours in zip(spent[name], spent["ours"], strict=True)]
        yield Figure(
            PART, f"{kind}: ours / {name}", **median_of(ratios), unit="x", how=how, target=target, at_least=True
        )


def _processor_seconds() -> float:
    """Of this process and of its children that are gone: every epoch ends its workers."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _contenders(folder: Path, files: list[bytes], workers: int) -> dict[str, Epoch]:
    items = [Item(number % CLASSES, content=content) for number, content in enumerate(files)]
    shards = write_dataset(
        folder / "shards", {"train": items}, [str(n) for n in range(CLASSES)], "benchmark", {}, shard_size=128
    )
    for number, content in enumerate(files):
        target = folder / "folder" / str(number % CLASSES)
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{number:06d}.jpg").write_bytes(content)
    return {
        "ours": _ours(shards.out / "train", len(files), workers),
        "webdataset": _webdataset(shards.out / "train", workers),
        "ImageFolder": _image_folder(folder / "folder", workers),
        "bare": _bare(files),
    }


def _through(batches: Iterable[Any]) -> int:
    """Take all batches, as a training loop would."""
    seen = 0
    for batch in batches:
        images = batch["image"] if isinstance(batch, dict) else batch[0]
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert images.dtype == torch.float32
        seen += len(images)
    return seen


def _ours(folder: Path, count: int, workers: int) -> Epoch:
    source = ImageShards(folder, image_size=SIZE, train=True, augment="crop", mean=MEAN, std=STD)
    position = 0

    def epoch() -> int:
        nonlocal position
        steps = count // BATCH
        batches = train_batches(source, seed=0, batch_size=BATCH, start=position, steps=steps, workers=workers)
        position += steps * BATCH
        return _through(batches)

    return epoch


def _usual_transform() -> Any:
    ensure_torchvision()
    from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

    return Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)])


def _webdataset(folder: Path, workers: int) -> Epoch:
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]

    def epoch() -> int:
        dataset = webdataset.WebDataset(shards, shardshuffle=100).shuffle(1000).decode("pilrgb")
        dataset = dataset.to_tuple("jpg", "cls").map_tuple(_usual_transform(), int).batched(BATCH)
        return _through(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))

    return epoch


def _image_folder(folder: Path, workers: int) -> Epoch:
    ensure_torchvision()
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(folder), _usual_transform())
    return lambda: _through(DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers))


def _bare(files: list[bytes]) -> Epoch:
    transform = build_transform(True, SIZE, "crop", mean=MEAN, std=STD)

    def epoch() -> int:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _through(
                {
                    "image": transform(
                        [Photo(content) for content in files[begin : begin + BATCH]], mix64(np.arange(BATCH))
                    )
                }
                for begin in range(0, len(files) - BATCH + 1, BATCH)
            )
        finally:
            torch.set_num_threads(threads)

    return epoch
