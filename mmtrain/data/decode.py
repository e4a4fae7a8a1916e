"""Bytes of an image file → a PIL image in RGB (or grey) with 8 bits a channel, upright."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

#: The most pixels of an image: Pillow's own limit, beyond which it takes a file for an attack.
MOST_PIXELS = 2 * (1024**3 // 4 // 3)

_ORIENTATION = 0x0112  # the EXIF tag


def decode(content: bytes, channels: int = 3) -> Image:
    """Decode fully and convert to RGB (``channels=3``) or L (``channels=1``); alpha is dropped.

    16-bit greys are scaled to 8 bits; PIL alone would clip them at 255. A photo that its camera marked as turned (EXIF)
    is turned upright. Raises ValueError if it cannot be decoded.
    """
    from PIL import Image, ImageOps

    mode = _mode(channels)
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels are more than {MOST_PIXELS}")
        image.load()
        if orientation(content) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # I;16, I;16B, and I in older versions of PIL
            grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            image = Image.fromarray((grey >> 8).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # PIL asks for this detour
        return image if image.mode == mode else image.convert(mode)
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise almost anything for damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from error


def orientation(content: bytes) -> int:
    """How a JPEG is to be turned, by its EXIF tag of that name: 1 (not at all) to 8."""
    if b"Exif\0\0" not in content[:4096]:
        return 1
    from PIL import Image

    try:
        found = Image.open(io.BytesIO(content)).getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged tag turns nothing
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _mode(channels: int) -> str:
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    return "RGB" if channels == 3 else "L"
