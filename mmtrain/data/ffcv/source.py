"""Data sources of ``.beton`` files, with the same samples at the same steps as the tar shards of the same data set."""

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

#: Folder with the memory limit and use of a container (cgroup v2), which psutil does not report.
_CONTAINER = Path("/sys/fs/cgroup")
#: Minimum number of shuffle windows whose pages are scheduled together without os_cache.
_SEGMENT = 4
_warned: set[tuple[Path, bool]] = set()


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
    """Open the data source of one file.

    Args:
        image_size, train, mean, std, augment, options: as for ``augment.build_augment``.
        os_cache: as for ``engine.Engine``.
        window: shuffle window in shards, for the check of the memory.

    Returns:
        ``StreamedBeton`` if the whole transform is compiled. Otherwise ``BetonImages``, whose batches are loaded in
        torch's worker processes.

    Raises:
        UserError: if the extra ``ffcv`` is missing, or the file is damaged or does not match the meta.json in its
            folder.
    """
    built = build_augment(train, image_size, augment, mean=mean, std=std, **options)
    require_ffcv()
    source = (StreamedBeton if built.compiled else BetonImages)(path, built, os_cache)
    if train:
        warn_of_thrashing(source.beton, os_cache, window)
    if not built.compiled:
        if not os_cache:
            logger.warning(
                "data.os_cache=false has no effect with data.augment=%s, whose worker processes map the file", augment
            )
        logger.info(
            "%s: data.augment=%s processes images one by one in Python, in data.workers processes; data.augment=crop "
            "(only crop and flip) is compiled and uses data.workers threads",
            source.beton.path,
            augment,
        )
        # Compile the decoder, which takes some seconds, once before worker processes are forked.
        source.fetch(np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.uint64))
    return source


class BetonImages:
    """Data source of a beton: {"image": float32 (B, 3, S, S) normalised, "label": int64 (B,)}.

    The attributes ``classes`` and ``num_classes`` come from ``meta.json`` in the folder of the file. They are None if
    there is no such file.
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
        """Return the file and the number of a sample, for messages."""
        return f"{self.beton.path}, image number {index}"

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> Batch:
        # One thread, because parallel code must not run in a forked process.
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
        return {**self.__dict__, "_engines": {}}  # compiled code cannot be pickled


class StreamedBeton(BetonImages):
    """Data source of a beton that decodes batches in threads of this process (see ``data.core.source.Streaming``)."""

    def batches(
        self,
        numbers: Iterator[NDArray[np.int64]],
        order: Order | None,
        *,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> Iterator[Batch]:
        """Yield a batch for each array in ``numbers``, bit-identical for every number of workers.

        Args:
            numbers: arrays of stream positions in ``order``; if ``order`` is None, sample indices for evaluation.
            workers: threads that decode (0: one thread).
            prefetch: batches that are decoded in advance, at least 2.
            pin_memory: allocate images in pinned memory.
        """
        if workers < 0:
            raise UserError(f"data.workers={workers}: must be at least 0 (number of FFCV's threads)")
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

        # Schedule several shuffle windows together, because pages that two segments share are read twice.
        samples = _SEGMENT * (1 if order is None else order.window) * len(self) // len(self.block_sizes)
        stream = Stream(engine, requests(), take, finish, ahead=ahead, segment=max(16, -(-samples // len(first))))
        try:
            yield from stream
        finally:
            stream.close()


def warn_of_thrashing(beton: Beton, os_cache: bool, window: int) -> None:
    """Log a warning, once per file, if the pages needed for random reading do not fit into memory.

    Args:
        window: shuffle window, in blocks.
    """
    if (beton.path, os_cache) in _warned:
        return
    free = free_memory()
    blocks = max(1, len(beton.block_sizes))
    # At the boundary of two windows, the pages of both are needed.
    windows = min(beton.stored, 2 * window * beton.stored // blocks)
    if os_cache and beton.stored > free:
        cure = (
            f"Set data.os_cache=false, which keeps only two shuffle windows in memory ({_gb(windows)} per rank), or "
            "create a smaller file (mmtrain data prepare ffcv --max-resolution 500 --write-mode jpg)"
        )
        what = f"the images ({_gb(beton.stored)}) do not fit into the free memory ({_gb(free)})"
    elif not os_cache and windows > free:
        cure = f"Set data.shuffle_window below {window}"
        what = (
            f"two shuffle windows of {window} blocks ({_gb(windows)} per rank) do not fit into the free memory "
            f"({_gb(free)})"
        )
    else:
        return
    _warned.add((beton.path, os_cache))
    logger.warning("%s: %s, so reading will often wait for the disk. %s", beton.path, what, cure)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def free_memory() -> int:
    """Return the bytes of memory that are available without swapping, including the page cache."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((_CONTAINER / "memory.max").read_text())  # "max" (no limit) raises ValueError
        used = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        return min(available, max(0, limit - int(used["anon"])))
    except (OSError, KeyError, ValueError):
        return available
