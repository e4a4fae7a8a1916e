"""Our FFCV path beside FFCV's own loader, and beside LitData's, on the same images.

    PYTHONPATH=benchmarks python -m data_parts.ffcv_part [--images FOLDER] [--threads 2] [--smoke] [--json FILE]

All make float32 batches of 224 × 224: decode, random resized crop, flip, normalise. The readings alternate in one
process, one epoch each after one to warm up, and a ratio is that of neighbours in time. FFCV's loader has its own
decoder, flip, NormalizeImage and ToTorchImage, in random order; ours has the order of the data clock. LitData (pip
install litdata) reads chunks of the same JPEG files in as many worker processes, and Pillow and torchvision do the
rest; it is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from trainer_parts.figure import Figure, machine, median_of

from data_parts.photos import HIGH, WIDE, make_images
from mmtrain.compat import ensure_torchvision
from mmtrain.data.beton.extra import require_ffcv, torch_threads_kept
from mmtrain.data.beton.source import open_beton
from mmtrain.data.loader import train_batches
from mmtrain.data.prepare.beton import prepare_beton
from mmtrain.data.prepare.writer import Item, write_dataset

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZE = 224
_CLASSES = 10

Epoch = Callable[[], int]  # reads an epoch, and says how many images that was


def measure(
    folder: Path, *, images: Path | None = None, threads: int = 2, pairs: int = 6, count: int = 1024, batch: int = 64
) -> Iterator[Figure]:
    """The ratios, each from ``pairs`` pairs of epochs of ``count`` images. Writes below ``folder``."""
    require_ffcv()
    files = make_images(count, images)
    items = [Item(number % _CLASSES, content=content) for number, content in enumerate(files)]
    shards = write_dataset(
        folder / "shards", {"train": items}, [str(n) for n in range(_CLASSES)], "benchmark", {}, shard_size=128
    )
    beton = prepare_beton(shards.out, folder / "beton", workers=1).out / "train.beton"
    how = f"{count} JPEG files of {WIDE} × {HIGH}, {np.mean([len(f) for f in files]) / 1e3:.0f} kB, {threads} threads"
    ours = _ours(beton, threads, batch, count)
    yield from _compare("bare FFCV", ours, _bare(beton, threads, batch), pairs, how, target=0.95)
    if importlib.util.find_spec("litdata") is None:
        print("LitData is left out: it is not installed (pip install litdata)", flush=True)
        return
    yield from _compare("LitData", ours, _litdata(folder / "litdata", files, threads, batch), pairs, how, target=None)


def _compare(name: str, ours: Epoch, other: Epoch, pairs: int, how: str, target: float | None) -> Iterator[Figure]:
    rates: dict[str, list[float]] = {"ours": [], name: []}
    for epoch in (ours, other):
        epoch()  # compiles, and brings the file into memory
    for pair in range(pairs):
        both = [("ours", ours), (name, other)]
        for label, epoch in both if pair % 2 else both[::-1]:
            begin = time.perf_counter()
            seen = epoch()
            rates[label].append(seen / (time.perf_counter() - begin))
    for label, values in rates.items():
        yield Figure(
            "ffcv",
            f"{label}, beside {name}" if label == "ours" else label,
            **median_of(values),
            unit="images/s",
            how=how,
        )
    ratios = [mine / theirs for mine, theirs in zip(*rates.values(), strict=True)]
    yield Figure("ffcv", f"ours / {name}", **median_of(ratios), unit="x", how=how, target=target, at_least=True)


def _through(batches: Iterable[Any]) -> int:
    """Take all batches, as a training loop would; the first image of each is looked at."""
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


class _Augmented:
    """What LitData's items become, in worker processes which import torchvision themselves."""

    steps: Any = None

    def __call__(self, item: dict[str, Any]) -> tuple[torch.Tensor, int]:
        if self.steps is None:
            ensure_torchvision()
            from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop, ToTensor

            self.steps = Compose([RandomResizedCrop(SIZE), RandomHorizontalFlip(), ToTensor(), Normalize(MEAN, STD)])
        return self.steps(Image.open(io.BytesIO(item["image"])).convert("RGB")), item["label"]


def _item(numbered: tuple[int, bytes]) -> dict[str, Any]:
    return {"image": numbered[1], "label": numbered[0] % _CLASSES}


def _litdata(folder: Path, files: list[bytes], threads: int, batch: int) -> Epoch:
    import litdata

    litdata.optimize(_item, list(enumerate(files)), str(folder), chunk_bytes="16MB", num_workers=1)
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, transform=_Augmented())
    loader = litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=threads, persistent_workers=True)
    return lambda: _through(loader)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="images to enlarge (default: made-up ones)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--count", type=int, default=1024, help="images of an epoch, a multiple of 64")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as JSON")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes, to see that it runs; the figures mean nothing"
    )
    given = parser.parse_args()
    here = machine()
    print("  ".join(f"{key}={value}" for key, value in here.items() if value is not None), flush=True)
    sizes = {"pairs": 2, "count": 16, "batch": 8} if given.smoke else {"pairs": given.pairs, "count": given.count}
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for figure in measure(Path(folder), images=given.images, threads=given.threads, **sizes):
            figures.append(figure)
            met = {None: "", True: ", met", False: ", NOT met"}[figure.met]
            target = "" if figure.target is None else f" (target at least {figure.target:g}{met})"
            print(f"{figure.name}: {figure.value:.3f} {figure.unit}{target}; {figure.how}", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"machine": here, "figures": [f.to_json() for f in figures]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
