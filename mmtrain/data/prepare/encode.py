"""One item of a dataset → the members of its sample in a shard."""

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
    """One image: a file, or its bytes. With a class, a file of targets, or targets as bytes."""

    label: int = 0
    path: str = ""
    content: bytes = b""
    target: str = ""
    note: bytes = b""


class BadSample(UserError):
    """An item whose files were read but hold nothing usable; ``--skip-bad`` leaves such ones out."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}; replace or remove it, then start again")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.path, self.reason)  # it comes back from worker processes


class Encoded(NamedTuple):
    """A sample's members (suffix → bytes), and what is counted over a split for its meta.json."""

    members: dict[str, bytes]
    counts: dict[str, int] = {}  # noqa: RUF012  # never changed


class Encoder(Protocol):
    """Makes the members of a sample. It is pickled for worker processes."""

    #: The samples have class numbers (``.cls``), so that their shards can be indexed for training.
    labelled: ClassVar[bool]

    def __call__(self, item: Item) -> Encoded:
        """Read and convert ``item``. Raises BadSample, and UserError for files that cannot be read."""
        ...


@dataclass(frozen=True)
class ClassEncoder:
    """An image and its class number. ``image_size``: its shorter side is shrunk to that many pixels at most."""

    image_size: int | None = None
    quality: int = QUALITY
    labelled: ClassVar[bool] = True

    def __call__(self, item: Item) -> Encoded:
        suffix, content, _ = encode_image(item, self.image_size, self.quality)
        return Encoded({suffix: content, "cls": str(item.label).encode()})


def check_encoding(image_size: int | None, quality: int = QUALITY) -> None:
    """Raise UserError for options that no encoder takes."""
    if image_size is not None and image_size < 1:
        raise UserError(f"--image-size {image_size}: pixels, 1 or more")
    if not 1 <= quality <= 100:
        raise UserError(f"--quality {quality}: 1 to 100")


def read_file(path: str) -> bytes:
    with os_errors(f"{path}: cannot read the file"):
        return Path(path).read_bytes()


def read_lines(path: Path) -> list[str]:
    """Lines that are not empty, without spaces around them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def package_file(package: str, member: str) -> Path | None:
    """A file of an installed package, which is not imported; None if it is not there."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders if (file := Path(folder) / member).is_file()), None)


def encode_image(item: Item, image_size: int | None, quality: int) -> tuple[str, bytes, tuple[int, int]]:
    """Suffix, bytes, and the size (W, H) before shrinking.

    The file as it is where that is possible, after decoding it fully to see that it can be. The suffix is that of the
    format found, whatever the file is called. CMYK becomes RGB, since not every decoder can do it.
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
    """The size (W, H) with the shorter side at most ``shorter`` pixels, in the same proportions."""
    if min(size) <= shorter:
        return size
    scale = shorter / min(size)
    return max(shorter, round(size[0] * scale)), max(shorter, round(size[1] * scale))


def to_bytes(image: Image, quality: int | None) -> bytes:
    """JPEG of that quality, or PNG (None)."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
