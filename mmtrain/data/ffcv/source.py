"""Sources of images from a ``.beton``: the same samples at the same steps as from the tar shards it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from mmtrain.data.core.buffers import Buffers
from mmtrain.data.core.fingerprint import Fingerprint, digest
from mmtrain.data.core.order import Order
from mmtrain.data.core.source import Batch
from mmtrain.data.ffcv.augment import Augment, build_augment
from mmtrain.data.ffcv.format import Beton, read_beton, require_ffcv
from mmtrain.errors import UserError
from mmtrain.log import logger

if TYPE_CHECKING:
    from mmtrain.data.ffcv.engine import Engine, Request

#: Where a container (cgroup v2) tells of its own limit and use, of which psutil knows nothing.
_CONTAINER = Path("/sys/fs/cgroup")
#: What is scheduled together without os_cache, in windows of the shuffle, at least.
_SEGMENT = 4
_told: set[tuple[Path, bool]] = set()


def open_beton(
    path: str | Path,
    *,
    image_size: int,
    train: bool,
    mean: Sequence[float],
    std: Sequence[float],
    augment: str = "none",
    os_cache: bool = True,
    window: int = 8,
    **options: Any,
) -> BetonImages:
    """The source for one file: ``StreamedBeton`` where all that is done to an image is compiled, else ``BetonImages``,
    whose batches are made in torch's loader processes.

    ``augment`` and the further keyword arguments are those of ``augment.build_augment``; ``os_cache`` is that of
    ``engine.Engine``; ``window`` is the shuffle's, for the check of the memory. Raises UserError for a missing extra, a
    damaged file, and one that does not belong to the meta.json beside it.
    """
    built = build_augment(train, image_size, augment, mean=mean, std=std, **options)
    require_ffcv()
    source = (StreamedBeton if built.compiled else BetonImages)(path, built, os_cache)
    if train:
        warn_of_thrashing(source.beton, os_cache, window)
    if not built.compiled:
        if not os_cache:
            logger.warning("data.os_cache=false does nothing with data.augment=%s: its processes map the file", augment)
        logger.info(
            "%s: data.augment=%s works on one image after the other in Python, in data.workers processes; "
            "data.augment=crop (crop and flip alone) is all compiled, and data.workers are threads then",
            source.beton.path,
            augment,
        )
        # compiles what it calls, in some seconds: once, before processes are forked from this one
        source.fetch(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.uint64))
    return source


class BetonImages:
    """Source of {"image": float32 (B, 3, S, S) normalised, "label": int64 (B,)} from a beton.

    ``classes`` and ``num_classes`` come from ``meta.json`` beside the file and are None without one.
    """

    def __init__(self, path: str | Path, augment: Augment, os_cache: bool = True) -> None:
        self.beton, self.augment, self.os_cache = read_beton(path), augment, os_cache
        self.block_sizes = self.beton.block_sizes
        self.labels, self.classes = self.beton.labels, self.beton.classes
        self.num_classes = None if self.classes is None else len(self.classes)
        self._engines: dict[tuple[int, bool], Engine] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> Fingerprint:
        mode, height, width, _, size = self.beton.rows
        ends = np.cumsum(self.block_sizes)
        blocks = [slice(end - count, end) for end, count in zip(ends, self.block_sizes, strict=True)]
        parts = (self.labels, mode, height, width, size)
        return {
            "indexes": [digest(*(part[block] for part in parts), size=4) for block in blocks],
            **({} if self.classes is None else {"classes": digest(self.classes)}),
        }

    def name_of(self, index: int) -> str:
        """The file and the number of a sample."""
        return f"{self.beton.path}, image number {index}"

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> Batch:
        # One thread: this may be a forked process, where parallel code must not run.
        engine = self._engine(1, True)
        images = np.empty(engine.recipe.shape(len(indices)), engine.recipe.dtype)
        with engine.opened([]) as state:
            engine.run(state(0), (np.ascontiguousarray(indices, dtype=np.int64), keys), images)
        return self._batch(images, indices, keys)

    def _batch(self, images: NDArray[Any], indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> Batch:
        made, finish = torch.from_numpy(images), self.augment.finish
        return {
            "image": made if finish is None else finish(made, keys),
            "label": torch.from_numpy(self.labels[indices]),
        }

    def _engine(self, threads: int, os_cache: bool) -> Engine:
        from mmtrain.data.ffcv.engine import Engine

        if (threads, os_cache) not in self._engines:
            self._engines[threads, os_cache] = Engine(self.beton, self.augment.recipe, threads, os_cache)
        return self._engines[threads, os_cache]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_engines": {}}  # compiled code does not pickle


class StreamedBeton(BetonImages):
    """Makes its batches itself, in threads of this process (see ``mmtrain.data.core.source.Streaming``)."""

    def batches(
        self,
        numbers: Iterator[NDArray[np.int64]],
        order: Order | None,
        *,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> Iterator[Batch]:
        """Batches of the stream positions ``numbers`` in ``order``; with ``order=None`` of these samples, to evaluate.

        ``workers``: threads that decode. Bit-identical for every number of them.
        """
        if workers < 0:
            raise UserError(f"data.workers={workers}: give the number of FFCV's threads, 1 or more")
        return self._stream(numbers, order, max(1, workers), max(2, prefetch), pin_memory)

    def _stream(
        self, numbers: Iterator[NDArray[np.int64]], order: Order | None, threads: int, ahead: int, pinned: bool
    ) -> Iterator[Batch]:
        from mmtrain.data.ffcv.engine import Stream

        first = next(numbers, None)
        if first is None:
            return
        engine = self._engine(threads, self.os_cache)
        buffers, kind = Buffers(), torch.from_numpy(np.empty(0, engine.recipe.dtype)).dtype

        def take(count: int) -> NDArray[Any]:
            shape = engine.recipe.shape(count)
            return (torch.empty(shape, dtype=kind, pin_memory=True) if pinned else buffers.tensor(shape, kind)).numpy()

        def requests() -> Iterator[tuple[Request, NDArray[np.int64]]]:
            for part in chain([first], numbers):
                if order is None:
                    yield (part, None), part
                else:
                    yield order.samples(part), part

        def finish(request: Request, part: NDArray[np.int64], images: NDArray[Any]) -> Batch:
            indices, keys = request
            batch = self._batch(images, indices, keys)
            batch["index"] = torch.from_numpy(indices)
            if keys is not None:
                batch["position"] = torch.from_numpy(part)
                batch["key"] = torch.from_numpy(keys.view(np.int64))
            return batch

        # At least some windows of the shuffle are scheduled together: pages that two segments share are read twice.
        samples = _SEGMENT * (1 if order is None else order.window) * len(self) // len(self.block_sizes)
        stream = Stream(engine, requests(), take, finish, ahead=ahead, segment=max(16, -(-samples // len(first))))
        try:
            yield from stream
        finally:
            stream.close()


def warn_of_thrashing(beton: Beton, os_cache: bool, window: int) -> None:
    """Say once for a file what to set where the pages of a random order will not stay in memory."""
    if (beton.path, os_cache) in _told:
        return
    free = free_memory()
    blocks = max(1, len(beton.block_sizes))
    # Two windows are at hand where one ends and the next begins.
    windows = min(beton.stored, 2 * window * beton.stored // blocks)
    if os_cache and beton.stored > free:
        cure = (
            f"set data.os_cache=false, which keeps the pages of two shuffle windows ({_gb(windows)} for each rank), or "
            "make the file smaller (mmtrain data prepare ffcv --max-resolution 500 --write-mode jpg)"
        )
        what = f"{_gb(beton.stored)} of images in a random order, but {_gb(free)} of memory"
    elif not os_cache and windows > free:
        cure = f"set data.shuffle_window below {window}"
        what = f"two shuffle windows of {window} blocks are {_gb(windows)} for each rank, but {_gb(free)} of memory"
    else:
        return
    _told.add((beton.path, os_cache))
    logger.warning("%s: %s: reading will wait for the disk again and again; %s", beton.path, what, cure)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def free_memory() -> int:
    """Bytes that can be had without swapping, what is now cached of files included."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((_CONTAINER / "memory.max").read_text())  # "max" where there is none
        used = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        return min(available, max(0, limit - int(used["anon"])))
    except (OSError, KeyError, ValueError):
        return available
