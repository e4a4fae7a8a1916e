"""Decoding of image files to upright 8-bit RGB or grey pixels, and the random augmentation of samples.

libjpeg-turbo can decode a JPEG at 1/2, 1/4 or 1/8 of its size (scaled inverse DCT). This is used where the crop is that
much larger than the target size, so a crop to 224 pixels never decodes an image of 4 megapixels at full size.

Random resized crop, flip and erasing are functions of the samples' random keys. Their distributions are the usual ones
(the crop of Szegedy et al. 2015 as in torchvision and timm, the erasing of Zhong et al. 2017 as in timm). Only the
random numbers come from a hash instead of a generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.core.order import mix64
from mmtrain.data.images.formats import MOST_PIXELS, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112  # EXIF tag "Orientation"
#: Colour spaces that simplejpeg converts to RGB or grey. Pillow decodes CMYK, because it handles Adobe's inverted CMYK.
_SPACES = ("YCbCr", "Gray")
#: Random resized crop: range of the area fraction, range of width / height, and attempts before the centre crop.
SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
#: Numbers of the draws of a key: the crop uses the first 4 · TRIES, then comes the flip; erasing begins at 64.
FLIP_DRAW, _ERASE = 4 * TRIES, 64

Pixels = NDArray[np.uint8]  # (height, width, channels)
Keys = NDArray[np.uint64]


def decode(content: bytes, channels: int = 3) -> Image:
    """Decode an image file fully and convert it to mode RGB (``channels=3``) or L (``channels=1``).

    Alpha is dropped. 16-bit grey values are scaled to 8 bits (PIL alone would clip them at 255). The image is rotated
    upright according to its EXIF orientation. Raises ValueError if the image cannot be decoded.
    """
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    mode = "RGB" if channels == 3 else "L"
    try:
        image: Image.Image = open_image(content)
        image.load()
        if orientation(content) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # I;16, I;16B, and I in older versions of PIL
            grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            image = Image.fromarray((grey >> 8).astype(np.uint8))
        elif image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # PIL warns if such an image is converted directly
        return image if image.mode == mode else image.convert(mode)
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise almost anything for damaged files
        readable = type(error) is ValueError  # from open_image, or from a plugin with a clear message
        raise ValueError(str(error) if readable else f"{type(error).__name__}: {error}") from error


def orientation(content: bytes) -> int:
    """Return the EXIF orientation of a JPEG or AVIF, 1 (upright) to 8. Other formats and damaged tags give 1."""
    if b"Exif\0\0" not in content[:4096] and content[4:12] != b"ftypavif":
        return 1
    try:
        found = open_image(content).getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged tag is ignored
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    left: int
    top: int
    width: int
    height: int


class Undecodable(ValueError):
    """The image at position ``place`` of a batch cannot be decoded."""

    def __init__(self, place: int, reason: object) -> None:
        super().__init__(str(reason))
        self.place = place


class Photo:
    """An image whose size is known and whose pixels are decoded on demand.

    Args:
        content: bytes of an image file. For a JPEG, only the header is read at first.
        channels: 3 (RGB) or 1 (grey).
        image: an image that is decoded already, in mode RGB or L; ``content`` is then ignored.

    Raises:
        ValueError: if the image cannot be decoded.
    """

    def __init__(self, content: bytes, channels: int = 3, image: Image | None = None) -> None:
        self.content, self.channels, self._image = content, channels, image
        self._jpeg = _jpeg_size(content) if image is None else None
        if self._jpeg is None and image is None:
            self._image = decode(content, channels)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        if self._jpeg is not None:
            return self._jpeg
        assert self._image is not None
        return self._image.size

    def whole(self) -> Image:
        """Return the whole image at its original size."""
        if self._image is None:
            from PIL import Image as images

            pixels = self._decode()
            if pixels is None:
                self._image = decode(self.content, self.channels)
            else:
                self._image = images.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return self._image

    def part(self, box: Box, size: int) -> Pixels:
        """Return the pixels in ``box``, decoded at 1/2, 1/4 or 1/8 of their size if both sides stay at least ``size``.

        Returns:
            uint8 (height, width, channels).
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
        """Decode the JPEG at 1/2**halvings of its size. Return None if Pillow has to decode the image instead."""
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
        except (ValueError, KeyError):  # KeyError: simplejpeg does not know the colour space
            return None  # simplejpeg also rejects harmless extra bytes; Pillow decides whether the file is damaged
        return pixels


def resized(pixels: Pixels, size: int) -> Pixels:
    """Resize ``pixels`` (h, w, C) to (size, size, C) by antialiased bicubic interpolation, as Pillow does."""
    import torch

    if pixels.shape[:2] == (size, size):
        return pixels
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(image, (size, size), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return width and height of an upright JPEG that simplejpeg can decode; None for all other files."""
    if not content.startswith(b"\xff\xd8") or orientation(content) != 1:
        return None
    import simplejpeg

    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(content, strict=False)
    except (ValueError, KeyError):  # KeyError: simplejpeg does not know the colour space
        return None
    if space not in _SPACES or width * height > MOST_PIXELS:
        return None
    return width, height


def uniform(keys: Keys | int, *numbers: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the draws ``numbers`` of each key (broadcast): float64, uniform in [0, 1)."""
    return (mix64(keys, *numbers) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_crops(keys: Keys, sizes: Sequence[tuple[int, int]]) -> list[Box]:
    """Return the random resized crop of each image.

    The area is uniform in ``SCALE`` (fractions of the image), and width / height is log-uniform in ``RATIO``. If none
    of ``TRIES`` attempts fits into the image, the crop is the largest centred box within ``RATIO``.

    Args:
        keys: random keys (B,).
        sizes: (width, height) of each image.
    """
    if not len(keys):
        return []
    draws = uniform(keys[:, None], np.arange(4 * TRIES)).reshape(len(keys), TRIES, 4)
    whole = np.asarray(sizes, dtype=np.float64).reshape(-1, 2, 1)
    area = whole[:, 0] * whole[:, 1] * (SCALE[0] + (SCALE[1] - SCALE[0]) * draws[..., 0])
    aspect = np.exp(np.log(RATIO[0]) + np.log(RATIO[1] / RATIO[0]) * draws[..., 1])
    width, height = np.floor(np.sqrt(area * aspect) + 0.5), np.floor(np.sqrt(area / aspect) + 0.5)
    fits = (width <= whole[:, 0]) & (height <= whole[:, 1]) & (np.minimum(width, height) >= 1)
    top = np.floor(draws[..., 2] * (whole[:, 1] - height + 1))
    left = np.floor(draws[..., 3] * (whole[:, 0] - width + 1))
    boxes = np.stack([left, top, width, height], -1).astype(np.int64)
    first = fits.argmax(1)
    return [Box(*boxes[n, first[n]].tolist()) if fits[n, first[n]] else _middle(*size) for n, size in enumerate(sizes)]


def _middle(width: int, height: int) -> Box:
    wide, high = width, height
    if width / height < RATIO[0]:
        high = min(height, max(1, int(width / RATIO[0] + 0.5)))
    elif width / height > RATIO[1]:
        wide = min(width, max(1, int(height * RATIO[1] + 0.5)))
    return Box((width - wide) // 2, (height - high) // 2, wide, high)


def flips(keys: Keys, probability: float) -> NDArray[np.bool_]:
    """Return which samples are mirrored (B,)."""
    return uniform(keys, FLIP_DRAW) < probability


def erase(
    pixels: NDArray[np.uint8], keys: Keys, probability: float, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Fill a random rectangle of some images with noise, in place (random erasing).

    The rectangle covers 2 to 33 % of the area, and its height / width is log-uniform from 0.3 to 1/0.3. The noise is
    normal, clipped to the range of the pixels.

    Args:
        pixels: images (B, S, S, C).
        keys: random keys (B,).
        probability: probability that an image is changed.
        mean, std: mean and standard deviation of the noise per channel, for pixels in 0..1.
    """
    side = pixels.shape[1]
    for n in np.flatnonzero(uniform(keys, _ERASE) < probability).tolist():
        for attempt in range(TRIES):
            at = _ERASE + 1 + 4 * attempt + np.arange(4)
            share, slant, x, y = uniform(keys[n], at).tolist()
            area, aspect = side * side * (0.02 + (1 / 3 - 0.02) * share), 0.3 ** (1 - 2 * slant)
            height, width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if height >= side or width >= side:
                continue
            top, left = int(y * (side - height + 1)), int(x * (side - width + 1))
            # RandomState is the only generator whose numbers NumPy guarantees to stay the same in every version.
            noise = np.random.RandomState(int(keys[n]) & 0xFFFFFFFF).standard_normal((height, width, len(mean)))
            values = np.rint(255 * (np.asarray(mean) + np.asarray(std) * noise))
            pixels[n, top : top + height, left : left + width] = values.clip(0, 255)
            break
