"""Small betons and the shards they were made of; importing this makes room for three threads, before numba counts."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

os.environ.setdefault("NUMBA_NUM_THREADS", "4")

SIZE = 16
LOOK: dict[str, Any] = {"image_size": SIZE, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
CLASSES = ["ant", "bee", "cat"]


def picture(seed: int, size: tuple[int, int], kind: str = "JPEG") -> bytes:
    """A smooth coloured pattern, so that resizing filters agree on it."""
    y, x = np.mgrid[0 : size[1], 0 : size[0]] / 16
    rng = np.random.default_rng(seed)
    waves = [np.sin(x * rng.uniform(0.2, 1) + y * rng.uniform(0.2, 1) + rng.uniform(0, 6)) for _ in range(3)]
    image = Image.fromarray((127.5 + 120 * np.stack(waves, -1)).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


@dataclass(frozen=True)
class Made:
    """``shards`` and ``beton``: folders of the same samples."""

    shards: Path
    beton: Path

    def source(self, split: str = "train", *, train: bool = True, **options: Any) -> Any:
        from mmtrain.data.ffcv.source import open_beton

        return open_beton(self.beton / f"{split}.beton", train=train, **{**LOOK, **options})


def make_shards(folder: Path, splits: dict[str, list[bytes]], shard_size: int) -> Path:
    from mmtrain.data.prepare.output import Origin
    from mmtrain.data.prepare.writer import Item, write_dataset

    items = {split: [Item(n % 3, content=c) for n, c in enumerate(contents)] for split, contents in splits.items()}
    return write_dataset(folder, items, CLASSES, Origin("made up"), {}, shard_size=shard_size).out


def make(folder: Path, splits: dict[str, list[bytes]], *, shard_size: int = 6, **options: Any) -> Made:
    from mmtrain.data.prepare.ffcv import prepare_beton

    shards = make_shards(folder / "shards", splits, shard_size)
    return Made(shards, prepare_beton(shards, folder / "beton", **{"page_size": 2, "workers": 1, **options}).out)
