"""Bytes of an image file → a PIL image in RGB (or grey) with 8 bits a channel."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def decode(content: bytes, channels: int = 3) -> Image:
    """Decode fully and convert to RGB (``channels=3``) or L (``channels=1``); alpha is dropped.

    16-bit greys are scaled to 8 bits; PIL alone would clip them at 255. Raises ValueError if it cannot be decoded.
    """
    from PIL import Image

    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        image.load()
        if image.mode.startswith("I"):  # I;16, I;16B, and I in older versions of PIL
            grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            image = Image.fromarray((grey >> 8).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # PIL asks for this detour
        return image if image.mode == _mode(channels) else image.convert(_mode(channels))
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise almost anything for damaged files
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _mode(channels: int) -> str:
    if channels not in (1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    return "RGB" if channels == 3 else "L"
