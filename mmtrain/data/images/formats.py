"""The image formats that are read, and the one function that opens an image.

Pillow opens whatever one of its plugins accepts, and chooses the plugin by the content: PostScript named ``.jpg`` would
be handed to Ghostscript. Here only the formats in ``_PLUGINS`` are ever tried.
"""

from __future__ import annotations

import importlib
import io
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

#: The most pixels of an image: Pillow's own limit, beyond which it takes a file for an attack.
MOST_PIXELS = 2 * (1024**3 // 4 // 3)

#: Pillow's modules for the formats that are read, and the endings of their files.
_PLUGINS = {
    "Jpeg": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "Png": (".png",),
    "WebP": (".webp",),
    "Bmp": (".bmp",),
    "Gif": (".gif",),
    "Tiff": (".tif", ".tiff"),
    "Ppm": (".ppm", ".pgm", ".pbm", ".pnm"),
    "Avif": (".avif",),
}


@cache
def _readable() -> dict[str, tuple[str, ...]]:
    """Pillow's name of each format that it can read here, and the endings of its files."""
    from PIL import Image

    # Pillow warns from half of the limit on, which is no fault of a large photo. What is beyond it is refused.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    found = {}
    for name, suffixes in _PLUGINS.items():
        try:
            plugin = importlib.import_module(f"PIL.{name}ImagePlugin")
        except ImportError:  # AVIF came with Pillow 11.3
            continue
        if getattr(plugin, "SUPPORTED", True):  # False: Pillow was built without that library
            found[name.upper()] = suffixes
    return found


@cache
def _formats() -> tuple[str, ...]:
    return tuple(_readable())


def image_suffixes() -> frozenset[str]:
    """The endings, with their dots and in lower case, of the files that are taken for images."""
    return frozenset(suffix for suffixes in _readable().values() for suffix in suffixes)


def open_image(source: bytes | Path) -> Image:
    """An image whose header is read and whose pixels are not yet decoded, of a file's bytes or of a file.

    Raises ValueError for what is no image of a format that is read, or has more than ``MOST_PIXELS`` pixels. A damaged
    file can raise almost anything, here and when it is decoded.
    """
    from PIL import Image, UnidentifiedImageError

    formats = _formats()
    try:
        image: Image.Image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"it is no image, or damaged; the formats that are read: {', '.join(formats)}") from error
    except Image.DecompressionBombError as error:
        raise _too_many() from error
    if image.width * image.height > MOST_PIXELS:
        raise _too_many()
    return image


def _too_many() -> ValueError:
    return ValueError(f"its header claims more than the {MOST_PIXELS:,} pixels that are read at most")
