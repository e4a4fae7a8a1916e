"""An encoded image whose size is known at once and whose pixels are decoded when a part of them is wanted.

A JPEG is decoded by libjpeg-turbo at a half, a quarter or an eighth of its size where the part wanted is that much
larger than what it is to become (scaled inverse DCT): a crop for 224 pixels never decodes 4 megapixels whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.decode import MOST_PIXELS, decode, orientation

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]  # (height, width, channels)

#: Colours that simplejpeg turns into RGB or grey. CMYK is left to Pillow, which knows Adobe's inverted ones.
_SPACES = ("YCbCr", "Gray")


class Box(NamedTuple):
    """A part of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Undecodable(ValueError):
    """The image at ``place`` of a batch cannot be decoded."""

    def __init__(self, place: int, reason: object) -> None:
        super().__init__(str(reason))
        self.place = place


class Photo:
    """Bytes of an image file, of which the header is read. Raises ValueError for what cannot be decoded."""

    def __init__(self, content: bytes, channels: int = 3) -> None:
        self.content, self.channels = content, channels
        self._image: Image | None = None
        self._jpeg = _jpeg_size(content)
        if self._jpeg is None:
            self._image = decode(content, channels)

    @classmethod
    def of(cls, image: Photo | Image, channels: int = 3) -> Photo:
        """``image`` itself, or a decoded one in RGB or L."""
        if isinstance(image, Photo):
            return image
        made = cls.__new__(cls)
        made.content, made.channels, made._image, made._jpeg = b"", channels, image, None
        return made

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        if self._jpeg is not None:
            return self._jpeg
        assert self._image is not None
        return self._image.size

    def whole(self) -> Image:
        """All of it, at its own size."""
        if self._image is None:
            from PIL import Image as images

            pixels = self._decode()
            self._image = decode(self.content, self.channels) if pixels is None else images.fromarray(_flat(pixels))
        return self._image

    def part(self, box: Box, size: int) -> Pixels:
        """(at least ``size`` × ``size``, channels): the pixels in ``box``, no smaller than they have to be.

        The part comes at its own size, or at 1/2, 1/4 or 1/8 of it where both of its sides stay ``size`` or more.
        """
        halvings = min(3, max(0, int(np.log2(max(min(box.width, box.height), 1) / size)))) if self._jpeg else 0
        pixels = self._decode(halvings) if self._image is None else None
        if pixels is None:
            pixels = np.array(self.whole())
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        x, y = pixels.shape[1] / self.size[0], pixels.shape[0] / self.size[1]
        left, top = round(box.left * x), round(box.top * y)
        right, bottom = round((box.left + box.width) * x), round((box.top + box.height) * y)
        return pixels[top : max(bottom, top + 1), left : max(right, left + 1)]

    def _decode(self, halvings: int = 0) -> Pixels | None:
        """The JPEG at 1/2**halvings of its size; None where Pillow has to say what is wrong with it, or nothing is."""
        import simplejpeg

        if self._jpeg is None:
            return None
        width, height = (-(-side // 2**halvings) for side in self._jpeg)
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(
                self.content,
                colorspace="RGB" if self.channels == 3 else "GRAY",
                min_width=width if halvings else 0,
                min_height=height if halvings else 0,
            )
        except ValueError:
            return None  # also for stray bytes, which harm nothing
        return pixels


def resized(pixels: Pixels, size: int, mode: str = "bicubic") -> Pixels:
    """(size, size, C): ``pixels`` (h, w, C) by antialiased "bicubic" or "bilinear" interpolation, as Pillow's."""
    import torch

    if pixels.shape[:2] == (size, size):
        return pixels
    given = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    made = torch.nn.functional.interpolate(given, (size, size), mode=mode, antialias=True)
    return made[0].permute(1, 2, 0).numpy()


def _flat(pixels: Pixels) -> NDArray[np.uint8]:
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that simplejpeg decodes as it is; None for all else."""
    if not content.startswith(b"\xff\xd8") or orientation(content) != 1:
        return None
    import simplejpeg

    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    except ValueError:
        return None
    if space not in _SPACES or width * height > MOST_PIXELS:
        return None
    return width, height
