"""The supported image formats, and the only function that opens image files.

Pillow chooses a plugin by the content of a file, not by its name: a PostScript file named ``.jpg`` would be passed to
Ghostscript. Therefore, only the formats in ``_PLUGINS`` are ever tried.
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

#: Maximum number of pixels of an image. It is the limit above which Pillow regards a file as a decompression bomb.
MOST_PIXELS = 2 * (1024**3 // 4 // 3)

#: Pillow's plugin modules of the supported formats, and the file extensions of each format.
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
    """Return Pillow's name of each supported format that the installed version can read, with its file extensions."""
    from PIL import Image

    # Pillow warns above half of the limit, but such large photos are valid. Larger images are rejected in open_image.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    found = {}
    for name, suffixes in _PLUGINS.items():
        try:
            plugin = importlib.import_module(f"PIL.{name}ImagePlugin")
        except ImportError:  # AVIF needs Pillow 11.3
            continue
        if getattr(plugin, "SUPPORTED", True):  # False: Pillow was built without the format's library
            found[name.upper()] = suffixes
    return found


@cache
def _formats() -> tuple[str, ...]:
    return tuple(_readable())


def image_suffixes() -> frozenset[str]:
    """Return the file extensions that are treated as images, in lower case with a leading dot."""
    return frozenset(suffix for suffixes in _readable().values() for suffix in suffixes)


def open_image(source: bytes | Path) -> Image:
    """Open an image: read its header, but do not decode its pixels yet.

    Args:
        source: path of the file, or its content.

    Raises:
        ValueError: if it is not an image of a supported format, or has more than ``MOST_PIXELS`` pixels. A damaged file
            can raise almost any exception, both here and when it is decoded.
    """
    from PIL import Image, UnidentifiedImageError

    formats = _formats()
    try:
        image: Image.Image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image, or damaged; supported formats: {', '.join(formats)}") from error
    except Image.DecompressionBombError as error:
        raise _too_many() from error
    if image.width * image.height > MOST_PIXELS:
        raise _too_many()
    return image


def _too_many() -> ValueError:
    return ValueError(f"the image has more pixels than the limit of {MOST_PIXELS:,}")
