"""Writing a dataset of tar shards: OUT/{train,val,test}/shard-000000.tar, their indexes, and OUT/meta.json.

The same input gives the same bytes: order by hash, fixed times and owners in the tars.
"""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmtrain.data.decode import decode
from mmtrain.data.order import mix64
from mmtrain.data.prepare.folder import complete_or_absent
from mmtrain.data.prepare.progress import progress
from mmtrain.data.tarindex import index_shard
from mmtrain.errors import UserError

FORMAT = 1
_KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_log = logging.getLogger("mmtrain")


class Item(NamedTuple):
    """One image: a file, or its bytes."""

    label: int
    path: str = ""
    content: bytes = b""


@dataclass(frozen=True)
class Prepared:
    out: Path
    meta: dict[str, Any]
    fresh: bool  # False: it was there already


class _Job(NamedTuple):
    target: Path
    first: int  # number of the first sample in its split
    items: list[Item]
    image_size: int | None


def existing(out: Path, source: str, settings: Mapping[str, Any], *, force: bool) -> Prepared | None:
    """The dataset at ``out`` if it is complete and was made from the same source with the same settings."""
    file = out / "meta.json"
    if force or not file.is_file():
        return None
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        made_of = {"source": meta["source"], **meta["settings"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not the meta.json of a prepared dataset ({error}); give --force or another --out"
        ) from error
    wanted = {"source": source, **settings}
    different = [
        f"{key} {made_of.get(key)!r}, not {wanted[key]!r}" for key in wanted if made_of.get(key) != wanted[key]
    ]
    if meta.get("format") != FORMAT:
        different.append(f"format {meta.get('format')}, not {FORMAT}")
    if different:
        raise UserError(f"{out}: holds a dataset made with {'; '.join(different)}; give --force or another --out")
    return Prepared(out, meta, fresh=False)


def write_dataset(
    out: Path,
    splits: Mapping[str, Sequence[Item]],
    classes: Sequence[str],
    source: str,
    settings: Mapping[str, Any],
    *,
    shard_size: int,
    image_size: int | None = None,
    workers: int = 1,
    force: bool = False,
) -> Prepared:
    """Write all splits beside ``out``, then rename. Items are shuffled, so that shards mix the classes."""
    if shard_size < 1:
        raise UserError(f"--shard-size {shard_size}: samples in a shard, 1 or more")
    with complete_or_absent(out, force=force) as part:
        jobs = [job for split, items in splits.items() for job in _jobs(part / split, items, shard_size, image_size)]
        with progress(f"writing {out.name}", sum(len(items) for items in splits.values())) as advance:
            for count in _run(jobs, workers):
                advance(count)
        meta = {
            "classes": list(classes),
            "counts": {split: len(items) for split, items in splits.items()},
            "source": source,
            "settings": dict(settings),
            "format": FORMAT,
        }
        with open(part / "meta.json", "w", encoding="utf-8") as stream:
            json.dump(meta, stream, indent=1)
            stream.write("\n")
            os.fsync(stream.fileno())
    return Prepared(out, meta, fresh=True)


def _jobs(folder: Path, items: Sequence[Item], shard_size: int, image_size: int | None) -> Iterator[_Job]:
    folder.mkdir()
    order = np.argsort(mix64(0, np.arange(len(items))), kind="stable").tolist()
    # Shards of nearly equal size: no last one with a handful of samples.
    parts = np.array_split(np.array(order, dtype=np.int64), max(1, -(-len(items) // shard_size)))
    first = 0
    for number, part in enumerate(parts):
        yield _Job(folder / f"shard-{number:06d}.tar", first, [items[place] for place in part], image_size)
        first += len(part)


def _run(jobs: list[_Job], workers: int) -> Iterator[int]:
    """Samples written, as shards are finished."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(_write_shard, jobs)
        return
    # spawn: a fork would inherit the threads' locks of whatever this process has loaded.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_die_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(_write_shard, job) for job in jobs]):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died: most often for lack of memory (use fewer --workers), or because a script calls "
                "this outside of `if __name__ == '__main__':` (or use workers=1)"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _die_with_parent() -> None:
    """Workers of a killed process would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_shard(job: _Job) -> int:
    from webdataset.writer import TarWriter

    with open(job.target, "wb") as stream:
        with TarWriter(stream, user="mmtrain", group="mmtrain", mtime=0, encoder=False) as tar:
            for number, item in enumerate(job.items, job.first):
                suffix, content = _encode(item, job.image_size)
                tar.write({"__key__": f"{number:08d}", suffix: content, "cls": str(item.label).encode()})
        stream.flush()
        os.fsync(stream.fileno())
    index_shard(job.target)
    return len(job.items)


def _encode(item: Item, image_size: int | None) -> tuple[str, bytes]:
    """Suffix and bytes: the file as it is where that is possible, after decoding it fully to see that it can be."""
    from PIL import Image

    try:
        content = item.content or Path(item.path).read_bytes()
    except OSError as error:
        raise UserError(f"{item.path}: cannot read the image ({error.strerror})") from error
    try:
        image = decode(content)
        with Image.open(io.BytesIO(content)) as header:
            kind, grey = header.format or "", header.mode in ("1", "L", "LA") or header.mode.startswith("I")
    except ValueError as error:
        raise UserError(
            f"{item.path}: the image cannot be decoded ({error}); replace or remove it, then start again"
        ) from error
    small = image_size is None or min(image.size) <= image_size
    if small and kind in _KEPT_FORMATS:
        return _KEPT_FORMATS[kind], content
    if grey:
        image = decode(content, channels=1)
    if not small and image_size is not None:
        scale = image_size / min(image.size)
        size = tuple(max(image_size, round(side * scale)) for side in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    lossy = kind == "JPEG"
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "JPEG", "quality": 95} if lossy else {"format": "PNG"}))
    return ("jpg" if lossy else "png"), buffer.getvalue()
