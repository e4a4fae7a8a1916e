"""Tar shards → FFCV's ``.beton``: OUT/{train,val,test}.beton and OUT/meta.json.

FFCV encodes the images and defines the format; the pages are laid out here, one shard after the other. FFCV's own
DatasetWriter waits for ever when one of its processes fails, lays the samples out in whichever order they come, and
draws which ones to compress. So: the same shards give the same bytes, and each shard is one run of pages.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.beton.extra import require_ffcv
from mmtrain.data.beton.format import read_beton
from mmtrain.data.images import read_classes
from mmtrain.data.prepare.beton_block import Block, Encoding, Job, encode_block
from mmtrain.data.prepare.folder import complete_or_absent
from mmtrain.data.prepare.pool import run_jobs
from mmtrain.data.prepare.progress import progress
from mmtrain.data.prepare.writer import FORMAT, Prepared, existing
from mmtrain.data.shards import find_shards
from mmtrain.data.tarindex import ShardIndex, index_shards
from mmtrain.errors import UserError

SPLITS = ("train", "val", "test")
WRITE_MODES = ("jpg", "raw", "proportion")


def prepare_beton(
    root: str | Path,
    out: str | Path,
    *,
    write_mode: str = "jpg",
    max_resolution: int | None = None,
    jpeg_quality: int | None = None,
    compress_probability: float = 0.5,
    page_size: int = 8,
    workers: int | None = None,
    force: bool = False,
) -> Prepared:
    """Write OUT/{train,val,test}.beton from the tar shards in ROOT/{train,val,test}, sample by sample in their order.

    ``write_mode``: "jpg", "raw" (pixels: fast to read, several times larger) or "proportion" (a part of
    ``compress_probability`` as JPEG, chosen by a hash of the sample's number). ``max_resolution``: shrink images whose
    longer side is longer. ``jpeg_quality``: encode every image anew; None: keep JPEG files as they are where they need
    not be shrunk, and encode others at 90. ``page_size``: MiB, a power of two from 2 to 2048; no image may be larger.
    ``workers``: processes (None: one per core, at most 8). A finished OUT is left alone.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    _check(root, out, write_mode, max_resolution, jpeg_quality, compress_probability, page_size)
    splits = {split: index_shards(find_shards(root / split)) for split in SPLITS if (root / split).is_dir()}
    if not splits:
        raise UserError(
            f"--root {root}: none of {', '.join(SPLITS)} is in it; wanted are folders of tar shards, as mmtrain data "
            "prepare images makes them"
        )
    counts = {split: sum(map(len, shards)) for split, shards in splits.items()}
    settings = {
        "write_mode": write_mode,
        "max_resolution": max_resolution,
        "jpeg_quality": jpeg_quality,
        "compress_probability": compress_probability,
        "page_size": page_size,
        "samples": counts,
    }
    source = str(root.absolute())
    if (done := existing(out, source, settings, force=force)) is not None:
        return done
    require_ffcv()
    encoding = Encoding(write_mode, max_resolution, jpeg_quality, compress_probability, page_size << 20)
    workers = min(8, os.cpu_count() or 1) if workers is None else max(1, workers)
    classes = read_classes(root / "meta.json")
    meta = {
        **({} if classes is None else {"classes": classes}),
        "counts": counts,
        "blocks": {split: [len(shard) for shard in shards] for split, shards in splits.items()},
        "source": source,
        "settings": settings,
        "format": FORMAT,
    }
    with complete_or_absent(out, force=force, resume=False) as part:
        with progress(f"writing {out.name}", sum(counts.values())) as advance:
            for split, shards in splits.items():
                for count in _write(part / f"{split}.beton", shards, encoding, workers):
                    advance(count)
        with open(part / "meta.json", "w", encoding="utf-8") as stream:
            json.dump(meta, stream, indent=1)
            stream.write("\n")
            os.fsync(stream.fileno())
        for split in splits:
            read_beton(part / f"{split}.beton")  # what was written can be read
    return Prepared(out, meta, fresh=True)


def _check(
    root: Path,
    out: Path,
    write_mode: str,
    max_resolution: int | None,
    jpeg_quality: int | None,
    compress_probability: float,
    page_size: int,
) -> None:
    if not root.is_dir():
        raise UserError(f"--root {root}: no such folder (looked for {root.absolute()})")
    if out.absolute() == root.absolute():
        raise UserError(f"--out {out} is the same folder as --root")
    if out.suffix == ".beton":
        raise UserError(f"--out {out}: give the folder, for example {out.parent}: there is a file for each split")
    if write_mode not in WRITE_MODES:
        raise UserError(f"--write-mode {write_mode}: one of {', '.join(WRITE_MODES)}")
    if max_resolution is not None and max_resolution < 1:
        raise UserError(f"--max-resolution {max_resolution}: pixels, 1 or more")
    if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
        raise UserError(f"--jpeg-quality {jpeg_quality}: 1 to 100")
    if not 0 <= compress_probability <= 1:
        raise UserError(f"--compress-probability {compress_probability}: 0 to 1")
    if not 2 <= page_size <= 2048 or page_size & (page_size - 1):
        raise UserError(f"--page-size {page_size}: MiB, a power of two from 2 to 2048")


def _write(target: Path, shards: list[ShardIndex], encoding: Encoding, workers: int) -> Iterator[int]:
    """Samples written, shard by shard."""
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type
    from ffcv.utils import align_to_page

    from mmtrain.data.prepare.beton_block import fields

    kinds = fields()
    row = get_metadata_type([field for _, field in kinds.values()])
    count = sum(map(len, shards))
    rows = np.zeros(count, dtype=row)
    table = np.zeros(count, dtype=ALLOC_TABLE_TYPE)
    header = np.zeros(1, dtype=HeaderType)
    header["version"], header["num_samples"], header["num_fields"] = CURRENT_VERSION, count, len(kinds)
    header["page_size"] = encoding.page_size
    described = np.zeros(len(kinds), dtype=FieldDescType)
    for place, (name, (number, field)) in enumerate(kinds.items()):
        described[place]["type_id"] = number
        described[place]["name"][: len(name)] = np.frombuffer(name.encode("ascii"), dtype=np.uint8)
        described[place]["arguments"][:] = field.to_binary()[0]
    at = int(align_to_page(header.nbytes + described.nbytes + rows.nbytes, encoding.page_size))
    firsts = np.cumsum([0] + [len(shard) for shard in shards]).tolist()
    jobs = [
        Job(shard, first, target.with_name(f"{target.name}.{number:06d}"), encoding)
        for number, (shard, first) in enumerate(zip(shards, firsts, strict=False))
    ]
    with open(target, "wb") as stream:
        for job, block in zip(jobs, run_jobs(encode_block, jobs, workers, ordered=True), strict=True):
            here = slice(job.first, job.first + len(job.shard))
            _place(block, at, rows[here], table[here], job.first)
            at = _append(stream, at, job.target, encoding.page_size)
            yield len(job.shard)
        header["alloc_table_ptr"] = at
        stream.seek(at)
        stream.write(table.tobytes())
        stream.seek(0)
        for part in (header, described, rows):
            stream.write(part.tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def _place(block: Block, at: int, rows: NDArray[Any], table: NDArray[Any], first: int) -> None:
    """Rows and places of a block that begins at byte ``at`` of the file."""
    rows[:] = block.rows
    rows["f0"]["data_ptr"] += np.uint64(at)
    table["sample_id"] = np.arange(first, first + len(rows))
    table["ptr"] = rows["f0"]["data_ptr"]
    table["size"] = block.sizes


def _append(stream: Any, at: int, part: Path, page_size: int) -> int:
    """Move the pages of a block into the file; returns where the next block begins. The unused end of the last page is
    a hole, which takes no room on the disk.
    """
    stream.seek(at)
    with open(part, "rb") as source:
        shutil.copyfileobj(source, stream, 16 << 20)
    pages = -(-part.stat().st_size // page_size)
    part.unlink()
    return at + pages * page_size
