"""Conversion of tar shards to FFCV's ``.beton`` files: OUT/{train,val,test}.beton and OUT/meta.json.

FFCV encodes the images, but this module writes the pages, shard by shard. FFCV's own DatasetWriter hangs if one of its
processes fails, writes the samples in arbitrary order, and chooses at random which ones to compress. Here, the same
shards always give the same bytes, and the samples of a shard are in consecutive pages.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.ffcv.format import read_beton, require_ffcv
from mmtrain.data.images.formats import open_image
from mmtrain.data.images.photo import decode, orientation, uniform
from mmtrain.data.images.shards import find_shards, read_classes
from mmtrain.data.images.tar_index import ShardIndex, index_shards
from mmtrain.data.images.tar_members import open_shard
from mmtrain.data.prepare.output import FORMAT, Origin, Prepared, check_root, existing, prepared_folder, write_meta
from mmtrain.data.prepare.pool import progress, run_jobs
from mmtrain.errors import UserError

SPLITS = ("train", "val", "test")
WRITE_MODES = ("jpg", "raw", "proportion")
_QUALITY = 90
_TAG = 0x6265746F6E  # separates the hashes that choose the images to compress from other hashes


class Encoding(NamedTuple):
    """Options for storing images (see :func:`prepare_beton`). ``page_size`` is in bytes."""

    write_mode: str
    max_resolution: int | None
    jpeg_quality: int | None
    compress_probability: float
    page_size: int


class Job(NamedTuple):
    """Conversion of one shard to a file of pages."""

    shard: ShardIndex
    first: int  # number of the shard's first sample in its split
    target: Path  # file to write
    encoding: Encoding


class Block(NamedTuple):
    """Result of a job: the rows of a shard with n samples."""

    rows: NDArray[Any]  # (n,) rows of the beton, with positions relative to the first page of the block
    sizes: NDArray[np.int64]  # (n,) stored bytes of each image


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
    """Write OUT/{train,val,test}.beton from the tar shards in ROOT/{train,val,test}, in the same order of samples.

    Args:
        root: folder of the tar shards.
        out: folder to write. A complete one is kept unless ``force`` is set.
        write_mode: "jpg", "raw" (pixels: fast to read, but several times larger) or "proportion" (a fraction
            ``compress_probability`` as JPEG, chosen by a hash of the sample's number; the others as pixels).
        max_resolution: maximum of the longer side, in pixels; larger images are shrunk.
        jpeg_quality: encode all images that are stored as JPEG with this quality. None: keep JPEG files that need not
            be shrunk, and encode the others with quality 90.
        page_size: in MiB, a power of two from 2 to 2048. No stored image may be larger.
        workers: processes (None: one per core, at most 8).
        force: replace an existing folder.

    Raises:
        UserError: for invalid options, damaged shards, or images that cannot be stored.
    """
    root, out = Path(root).expanduser(), Path(out).expanduser()
    check_root(root, out)
    if out.suffix == ".beton":
        raise UserError(f"--out {out}: must be a folder (for example {out.parent}), which gets one file per split")
    if write_mode not in WRITE_MODES:
        raise UserError(f"--write-mode {write_mode}: must be one of {', '.join(WRITE_MODES)}")
    if max_resolution is not None and max_resolution < 1:
        raise UserError(f"--max-resolution {max_resolution}: must be at least 1 (pixels)")
    if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
        raise UserError(f"--jpeg-quality {jpeg_quality}: must be from 1 to 100")
    if not 0 <= compress_probability <= 1:
        raise UserError(f"--compress-probability {compress_probability}: must be from 0 to 1")
    if not 2 <= page_size <= 2048 or page_size & (page_size - 1):
        raise UserError(f"--page-size {page_size}: must be a power of two from 2 to 2048 (MiB)")
    splits = {split: index_shards(find_shards(root / split)) for split in SPLITS if (root / split).is_dir()}
    if not splits:
        raise UserError(
            f"--root {root}: contains none of the folders {', '.join(SPLITS)}. Create folders of tar shards with "
            "`mmtrain data prepare images`"
        )
    counts = {split: sum(map(len, shards)) for split, shards in splits.items()}
    encoding = Encoding(write_mode, max_resolution, jpeg_quality, compress_probability, page_size << 20)
    settings = {**encoding._asdict(), "page_size": page_size, "samples": counts}
    origin = Origin.of(root)
    if (done := existing(out, origin, settings, force=force)) is not None:
        return done
    require_ffcv()
    classes = read_classes(root / "meta.json")
    meta = {
        **({} if classes is None else {"classes": classes}),
        "counts": counts,
        "blocks": {split: [len(shard) for shard in shards] for split, shards in splits.items()},
        **origin.to_meta(),
        "settings": settings,
        "format": FORMAT,
    }
    with prepared_folder(out, force=force) as part:
        with progress(f"writing {out.name}", sum(counts.values())) as advance:
            for split, shards in splits.items():
                for count in _write(part / f"{split}.beton", shards, encoding, workers):
                    advance(count)
        write_meta(part, meta)
        for split in splits:
            read_beton(part / f"{split}.beton")  # check the written file
    return Prepared(out, meta, fresh=True)


def _write(target: Path, shards: list[ShardIndex], encoding: Encoding, workers: int | None) -> Iterator[int]:
    """Write a beton. Yield the number of samples of each shard after it is written."""
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type
    from ffcv.utils import align_to_page

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
            rows[here] = block.rows
            rows["f0"]["data_ptr"][here] += np.uint64(at)
            table["sample_id"][here] = np.arange(here.start, here.stop)
            table["ptr"][here] = rows["f0"]["data_ptr"][here]
            table["size"][here] = block.sizes
            stream.seek(at)
            with open(job.target, "rb") as source:
                shutil.copyfileobj(source, stream, 16 << 20)
            # The unused end of the last page is a hole in the file, which takes no space on the disk.
            at += -(-job.target.stat().st_size // encoding.page_size) * encoding.page_size
            job.target.unlink()
            yield len(job.shard)
        header["alloc_table_ptr"] = at
        stream.seek(at)
        stream.write(table.tobytes())
        stream.seek(0)
        for part in (header, described, rows):
            stream.write(part.tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def fields() -> dict[str, tuple[int, Any]]:
    """Return the fields of a beton: name → (FFCV's type number, field)."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import TYPE_ID_HANDLER

    numbers = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    return {"image": (numbers[RGBImageField], RGBImageField()), "label": (numbers[IntField], IntField())}


def encode_block(job: Job) -> Block:
    """Write the pages of one shard to ``job.target``. Raises UserError if a sample cannot be stored."""
    require_ffcv()
    from ffcv.types import get_metadata_type

    rows = np.zeros(len(job.shard), dtype=get_metadata_type([field for _, field in fields().values()]))
    rows["f1"] = job.shard.labels
    sizes = np.zeros(len(job.shard), dtype=np.int64)
    encoder = _Encoder(job.encoding)
    with open(job.target, "wb") as stream, open_shard(job.shard.path) as tar:
        pages = _Pages(stream, job.encoding.page_size)
        for place in range(len(job.shard)):
            name = f"{job.shard.path}, sample {str(job.shard.keys[place])!r}"
            tar.seek(int(job.shard.offsets[place]))
            content = tar.read(int(job.shard.sizes[place]))
            pages.name = name
            try:
                encoder.store(content, job.first + place, rows["f0"][place : place + 1], pages.malloc)
            except (UserError, OSError, MemoryError):
                raise
            except Exception as error:  # raised by PIL, OpenCV or FFCV
                raise UserError(
                    f"{name}: the image cannot be stored ({error}). Replace the image and prepare the shards again"
                ) from error
            sizes[place] = pages.size
    return Block(rows, sizes)


class _Pages:
    """Allocator of images in pages, as FFCV requires it: images follow each other, and none crosses a page boundary."""

    def __init__(self, stream: BinaryIO, page_size: int) -> None:
        self.stream, self.page_size = stream, page_size
        self.end = self.size = 0
        self.name = ""

    def malloc(self, size: int) -> tuple[int, _Slot]:
        if size > self.page_size:
            raise UserError(
                f"{self.name}: {size} bytes to store, more than a page of {self.page_size >> 20} MiB. Set --page-size "
                f"{1 << max(1, (size - 1 >> 20).bit_length())}, --max-resolution or --write-mode jpg"
            )
        if self.end % self.page_size + size > self.page_size:
            self.end += -self.end % self.page_size
        begin = self.end
        self.end, self.size = begin + size, size
        return begin, _Slot(self.stream, begin)


class _Slot:
    """Place for one image in a file. FFCV writes to it with ``slot[:] = bytes``."""

    def __init__(self, stream: BinaryIO, at: int) -> None:
        self.stream, self.at = stream, at

    def __setitem__(self, _: slice, content: NDArray[np.uint8]) -> None:
        self.stream.seek(self.at)  # may skip the unused end of the previous page
        self.stream.write(np.ascontiguousarray(content).tobytes())


class _Encoder:
    """Encodes image files as rows and data of a beton."""

    def __init__(self, encoding: Encoding) -> None:
        from ffcv.fields import RGBImageField

        self.encoding = encoding
        quality = _QUALITY if encoding.jpeg_quality is None else encoding.jpeg_quality
        self.modes = {
            mode: RGBImageField(write_mode=mode, max_resolution=encoding.max_resolution, jpeg_quality=quality)
            for mode in ("jpg", "raw")
        }

    def store(self, content: bytes, number: int, row: NDArray[Any], malloc: Any) -> None:
        """Fill ``row`` (1,) of sample ``number``, and write its image to memory from ``malloc``."""
        image = decode(content)
        mode = self.encoding.write_mode
        if mode == "proportion":
            mode = "jpg" if uniform(_TAG, number)[0] < self.encoding.compress_probability else "raw"
        if mode == "jpg" and self._can_stay(content, image.size):
            row["mode"], row["width"], row["height"] = 0, *image.size
            row["data_ptr"], slot = malloc(len(content))
            slot[:] = np.frombuffer(content, dtype=np.uint8)
        else:
            self.modes[mode].encode(row, np.asarray(image), malloc)

    def _can_stay(self, content: bytes, size: tuple[int, int]) -> bool:
        """Return whether the file can be stored unchanged: an upright grey or YCbCr JPEG that need not be shrunk."""
        from ffcv.libffcv import imdecode

        most = self.encoding.max_resolution
        if self.encoding.jpeg_quality is not None or (most is not None and max(size) > most):
            return False
        if orientation(content) != 1:
            return False  # FFCV ignores EXIF
        with open_image(content) as header:
            if header.format != "JPEG" or header.mode not in ("RGB", "L"):
                return False
        width, height = size
        target = np.empty((height, width, 3), dtype=np.uint8)
        source = np.frombuffer(content, dtype=np.uint8)
        return imdecode(source, target, height, width, height, width) == 0
