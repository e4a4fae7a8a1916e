"""One tar shard → a run of pages of a beton, in a process of its own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.beton.extra import require_ffcv
from mmtrain.data.decode import decode, orientation
from mmtrain.data.order import mix64
from mmtrain.data.tarindex import ShardIndex
from mmtrain.errors import UserError

_QUALITY = 90
_TAG = 0x6265746F6E  # keeps the choice of what to compress apart from the other hashes


class Encoding(NamedTuple):
    """How images are stored: see ``beton.prepare_beton``; ``page_size`` in bytes."""

    write_mode: str
    max_resolution: int | None
    jpeg_quality: int | None
    compress_probability: float
    page_size: int


class Job(NamedTuple):
    shard: ShardIndex
    first: int  # number of the first sample in its split
    target: Path
    encoding: Encoding


class Block(NamedTuple):
    rows: NDArray[Any]  # (n,) as the beton has them, but for places, which count from the block's begin
    sizes: NDArray[np.int64]  # (n,) bytes


def fields() -> dict[str, tuple[int, Any]]:
    """Name → FFCV's number of the kind, and the field."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import TYPE_ID_HANDLER

    numbers = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    return {"image": (numbers[RGBImageField], RGBImageField()), "label": (numbers[IntField], IntField())}


def encode_block(job: Job) -> Block:
    """Write the pages of one shard to ``job.target``. Raises UserError with the sample that cannot be stored."""
    require_ffcv()
    from ffcv.types import get_metadata_type

    rows = np.zeros(len(job.shard), dtype=get_metadata_type([field for _, field in fields().values()]))
    rows["f1"] = job.shard.labels
    sizes = np.zeros(len(job.shard), dtype=np.int64)
    encoder = _Encoder(job.encoding)
    with open(job.target, "wb") as stream, _open(job.shard.path) as tar:
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
            except Exception as error:  # of PIL, OpenCV or FFCV
                raise UserError(f"{name}: the image cannot be stored ({error}); replace it in the source") from error
            sizes[place] = pages.size
    return Block(rows, sizes)


def _open(path: Path | str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read the shard ({error.strerror})") from error


class _Pages:
    """Allocates as FFCV wants it: an image lies in one page, behind the one before it."""

    def __init__(self, stream: BinaryIO, page_size: int) -> None:
        self.stream, self.page_size = stream, page_size
        self.end = self.size = 0
        self.name = ""

    def malloc(self, size: int) -> tuple[int, _Slot]:
        if size > self.page_size:
            raise UserError(
                f"{self.name}: {size} bytes to store, more than a page of {self.page_size >> 20} MiB: give --page-size "
                f"{1 << max(1, (size - 1 >> 20).bit_length())}, --max-resolution or --write-mode jpg"
            )
        if self.end % self.page_size + size > self.page_size:
            self.end += -self.end % self.page_size
        begin = self.end
        self.end, self.size = begin + size, size
        return begin, _Slot(self.stream, begin)


class _Slot:
    """What FFCV assigns an image's bytes to: ``slot[:] = bytes``."""

    def __init__(self, stream: BinaryIO, at: int) -> None:
        self.stream, self.at = stream, at

    def __setitem__(self, _: slice, content: NDArray[np.uint8]) -> None:
        self.stream.seek(self.at)  # over the unused end of a page, if one has just ended
        self.stream.write(np.ascontiguousarray(content).tobytes())


class _Encoder:
    """Image files → FFCV's rows and bytes."""

    def __init__(self, encoding: Encoding) -> None:
        from ffcv.fields import RGBImageField

        self.encoding = encoding
        quality = _QUALITY if encoding.jpeg_quality is None else encoding.jpeg_quality
        self.modes = {
            mode: RGBImageField(write_mode=mode, max_resolution=encoding.max_resolution, jpeg_quality=quality)
            for mode in ("jpg", "raw")
        }

    def store(self, content: bytes, number: int, row: NDArray[Any], malloc: Any) -> None:
        """Fill ``row`` (1,) for sample ``number`` and put its bytes where ``malloc`` says."""
        image = decode(content)
        mode = self._mode(number)
        if mode == "jpg" and self._can_stay(content, image.size):
            row["mode"], row["width"], row["height"] = 0, *image.size
            row["data_ptr"], slot = malloc(len(content))
            slot[:] = np.frombuffer(content, dtype=np.uint8)
        else:
            self.modes[mode].encode(row, np.asarray(image), malloc)

    def _mode(self, number: int) -> str:
        if self.encoding.write_mode != "proportion":
            return self.encoding.write_mode
        chance = float(mix64(_TAG, number)[0] >> np.uint64(11)) * 2.0**-53
        return "jpg" if chance < self.encoding.compress_probability else "raw"

    def _can_stay(self, content: bytes, size: tuple[int, int]) -> bool:
        """Whether FFCV reads the file itself as PIL does: an upright JPEG in grey or YCbCr, not to be shrunk."""
        from ffcv.libffcv import imdecode
        from PIL import Image

        most = self.encoding.max_resolution
        if self.encoding.jpeg_quality is not None or (most is not None and max(size) > most):
            return False
        if orientation(content) != 1:
            return False  # FFCV does not look at EXIF
        with Image.open(io.BytesIO(content)) as header:
            if header.format != "JPEG" or header.mode not in ("RGB", "L"):
                return False
        width, height = size
        target = np.empty((height, width, 3), dtype=np.uint8)
        source = np.frombuffer(content, dtype=np.uint8)
        return imdecode(source, target, height, width, height, width) == 0
