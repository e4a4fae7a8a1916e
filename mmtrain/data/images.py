"""Images in WebDataset tar shards, read by offset."""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmtrain.data.decode import decode
from mmtrain.data.tarindex import index_shard, index_shards
from mmtrain.data.transforms import build_transform
from mmtrain.errors import UserError, nearest

_HOW = (
    "make one with: mmtrain data prepare images --root IMAGES --out {out} (or: mmtrain data prepare digits --out ...)"
)


def find_shards(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """Tar shards of a folder (``*.tar``, sorted), of a brace pattern ``shard-{000000..000003}.tar``, or of a list."""
    if not isinstance(path, str | Path):
        return [shard for part in path for shard in find_shards(part)]
    text = os.path.expanduser(str(path))
    if "{" in text:
        from braceexpand import braceexpand

        try:
            shards = [Path(part) for part in braceexpand(text)]
        except ValueError as error:
            raise UserError(f"{text}: not a brace pattern ({error}); write shard-{{000000..000003}}.tar") from error
    elif Path(text).is_dir():
        shards = sorted(Path(text).glob("*.tar"))
        if not shards:
            raise UserError(f"{text}: no *.tar shards in this folder{_splits(Path(text))}; {_how(Path(text))}")
    else:
        shards = [Path(text)]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        what = "no such folder or shard" if len(shards) == 1 else f"{len(missing)} of {len(shards)} shards are missing"
        here = Path.cwd() / missing[0]
        hint = nearest(here.name, _names(here.parent))
        raise UserError(f"{text}: {what} (looked for {here}){hint}; {_how(missing[0])}")
    return shards


def _how(path: Path) -> str:
    return _HOW.format(out=path.parent if path.suffix != ".tar" else path.parent.parent)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _splits(folder: Path) -> str:
    found = sorted({shard.parent.name for shard in folder.glob("*/*.tar")})
    return f" (there are some in its folders {', '.join(found)}: give one of them)" if found else ""


class _ShardFiles:
    """Open files of the shards in use. Reads by position, so forked workers can share them; a pickle holds none."""

    LIMIT = 32

    def __init__(self) -> None:
        self.open: OrderedDict[Path, int] = OrderedDict()

    def read(self, path: Path, offset: int, size: int) -> bytes:
        handle = self.open.pop(path, None)
        if handle is None:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self.open) >= self.LIMIT:
                os.close(self.open.popitem(last=False)[1])
        self.open[path] = handle  # most recently used last
        return os.pread(handle, size, offset)

    def __getstate__(self) -> dict[str, Any]:
        return {"open": OrderedDict()}

    def __del__(self) -> None:
        while self.open:
            os.close(self.open.popitem()[1])


class ImageShards:
    """Source of {"image": float32 (B, C, S, S) normalised, "label": int64 (B,)} from tar shards.

    ``augment`` and the further keyword arguments are those of ``transforms.build_transform``. ``num_classes`` and
    ``classes`` come from ``meta.json`` in the dataset's root (the folder above the split) and are None without one.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        image_size: int,
        train: bool,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int = 3,
        augment: str = "none",
        **augment_options: Any,
    ) -> None:
        self.transform = build_transform(
            train, image_size, augment, mean=mean, std=std, channels=channels, **augment_options
        )
        self.channels = channels
        shards = index_shards(find_shards(path))
        self.paths = [shard.path for shard in shards]
        self.block_sizes = [len(shard) for shard in shards]
        # One array each over all shards; the keys stay on disk, they are only needed to report a fault.
        self._offsets = np.concatenate([shard.offsets for shard in shards])
        self._sizes = np.concatenate([shard.sizes for shard in shards])
        self.labels: NDArray[np.int64] = np.concatenate([shard.labels for shard in shards])
        self._ends = np.cumsum(self.block_sizes)
        self._files = _ShardFiles()
        self.classes = _classes(self.paths[0].parent.parent)
        self.num_classes = None if self.classes is None else len(self.classes)
        if self.num_classes is not None and int(self.labels.max()) >= self.num_classes:
            first = int(np.argmax(self.labels >= self.num_classes))
            raise UserError(
                f"{self._name(first)}: label {self.labels[first]}, but meta.json lists {self.num_classes} classes "
                "(0 is the first): the shards and meta.json do not belong together; prepare the dataset again"
            )

    def __len__(self) -> int:
        return len(self._offsets)

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> dict[str, torch.Tensor]:
        images: list[Any] = [None] * len(indices)
        for place in np.argsort(indices, kind="stable").tolist():  # along the shards, whatever the shuffle
            images[place] = self._image(int(indices[place]))
        return {"image": self.transform(images, keys), "label": torch.from_numpy(self.labels[indices])}

    def _image(self, index: int) -> Any:
        path, size = self._path(index), int(self._sizes[index])
        try:
            content = self._files.read(path, int(self._offsets[index]), size)
        except OSError as error:
            raise UserError(f"{path}: cannot read the shard ({error.strerror})") from error
        if len(content) != size:
            raise UserError(f"{path}: the shard was cut short after the run started; copy or prepare it again")
        try:
            return decode(content, self.channels)
        except ValueError as error:
            raise UserError(
                f"{self._name(index)}: the image cannot be decoded ({error}); replace it in the source and prepare the "
                "dataset again (mmtrain data prepare images --force)"
            ) from error

    def _path(self, index: int) -> Path:
        return self.paths[int(np.searchsorted(self._ends, index, side="right"))]

    def _name(self, index: int) -> str:
        block = int(np.searchsorted(self._ends, index, side="right"))
        within = index - (int(self._ends[block - 1]) if block else 0)
        try:
            key = f"sample {str(index_shard(self.paths[block]).keys[within])!r}"
        except (UserError, IndexError):  # the shard was damaged since: the number must do
            logging.getLogger("mmtrain").debug("no keys for %s", self.paths[block])
            key = f"sample number {within}"
        return f"{self.paths[block]}, {key}"


def _classes(root: Path) -> list[str] | None:
    meta = root / "meta.json"
    if not meta.is_file():
        return None
    try:
        classes = json.loads(meta.read_text(encoding="utf-8"))["classes"]
        return [str(name) for name in classes]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{meta}: not readable as JSON with a list "classes" ({error}); prepare the dataset again'
        ) from error
