"""Encoding of one item of a data set as the members of a sample in a shard."""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from mmtrain.data.images.formats import open_image
from mmtrain.data.images.photo import decode
from mmtrain.errors import UserError, os_errors

if TYPE_CHECKING:
    from PIL.Image import Image

QUALITY = 95
_KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}


class Item(NamedTuple):
    """One image (a file or its content), with a class, a file of targets, or encoded targets."""

    label: int = 0  # class number
    path: str = ""  # image file
    content: bytes = b""  # content of the image file; empty: read ``path``
    target: str = ""  # file of the targets, for example a mask
    note: bytes = b""  # encoded targets, for example annotations as JSON


class BadSample(UserError):
    """The files of an item were read, but their content is unusable. ``--skip-bad`` skips such items."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}. Replace or remove it, then start again")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.path, self.reason)  # worker processes send it to the main process


class Encoded(NamedTuple):
    """The encoded members of a sample."""

    members: dict[str, bytes]  # suffix → content
    counts: dict[str, int] = {}  # noqa: RUF012  # counts (e.g. pixels per class) that meta.json sums up over a split


class Encoder(Protocol):
    """Function that encodes an item as the members of a sample. It must be picklable for worker processes."""

    #: Whether the samples have class numbers (``.cls``), so that their shards can be indexed for training.
    labelled: ClassVar[bool]

    def __call__(self, item: Item) -> Encoded:
        """Read and encode ``item``.

        Raises:
            BadSample: if its content is unusable.
            UserError: if a file cannot be read.
        """
        ...


@dataclass(frozen=True)
class ClassEncoder:
    """Encodes an image and its class number as the files of a WebDataset sample."""

    image_size: int | None = None  # maximum of the shorter side, in pixels; larger images are shrunk
    quality: int = QUALITY  # of JPEGs that are encoded again
    labelled: ClassVar[bool] = True

    def __call__(self, item: Item) -> Encoded:
        suffix, content, _ = encode_image(item, self.image_size, self.quality)
        return Encoded({suffix: content, "cls": str(item.label).encode()})


def check_encoding(image_size: int | None, quality: int = QUALITY) -> None:
    """Raise UserError for an invalid image size or JPEG quality."""
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size}: must be at least 1 (pixels)")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality}: must be from 1 to 100")


def read_file(path: str) -> bytes:
    """Return the content of a file. Raises UserError if it cannot be read."""
    with os_errors(f"{path}: cannot read the file"):
        return Path(path).read_bytes()


def read_lines(path: Path) -> list[str]:
    """Return the non-empty lines of a text file without surrounding spaces. Raises UserError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def package_file(package: str, member: str) -> Path | None:
    """Return the path of a file in an installed package, without importing the package (None: no such file)."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders if (file := Path(folder) / member).is_file()), None)


def encode_image(item: Item, image_size: int | None, quality: int) -> tuple[str, bytes, tuple[int, int]]:
    """Encode the image of an item for a shard.

    The file is stored unchanged if possible. It is always decoded, to check that it is not damaged. CMYK images are
    converted to RGB, because not every decoder supports CMYK.

    Args:
        image_size: maximum of the shorter side, in pixels (None: no limit).
        quality: of JPEGs that are encoded again.

    Returns:
        The suffix of the actual format (regardless of the file name), the encoded image, and its size (W, H) before
        shrinking.

    Raises:
        BadSample: if the image cannot be decoded.
    """
    from PIL import Image

    content = item.content or read_file(item.path)
    try:
        image = decode(content)
        with open_image(content) as header:
            kind, mode = header.format or "", header.mode
    except ValueError as error:
        raise BadSample(item.path, f"the image cannot be decoded ({error})") from error
    full = image.size
    small = image_size is None or min(full) <= image_size
    if small and kind in _KEPT_FORMATS and mode != "CMYK":
        return _KEPT_FORMATS[kind], content, full
    if mode in ("1", "L", "LA") or mode.startswith("I"):
        image = decode(content, channels=1)
    if not small and image_size is not None:
        image = image.resize(shrunk(full, image_size), Image.Resampling.BICUBIC)
    lossy = kind in ("JPEG", "MPO", "AVIF")
    return ("jpg" if lossy else "png"), to_bytes(image, quality if lossy else None), full


def shrunk(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """Return ``size`` (W, H), scaled down so that the shorter side has at most ``shorter`` pixels."""
    if min(size) <= shorter:
        return size
    scale = shorter / min(size)
    return max(shorter, round(size[0] * scale)), max(shorter, round(size[1] * scale))


def to_bytes(image: Image, quality: int | None) -> bytes:
    """Encode an image as JPEG of the given quality, or as PNG if ``quality`` is None."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
