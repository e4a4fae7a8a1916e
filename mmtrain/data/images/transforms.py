"""Transforms of images to normalised float32 batches. All randomness is a function of each sample's random key.

"none"      no randomness: timm's resize and centre crop, as in evaluation.
"light"     small random affine transform (rotation, shift, scale), for example for digits. It is computed on the
            decoded batch as a tensor: several times faster than PIL at 32 × 32, and deterministic. Pixels from outside
            of the image are black.
"crop"      random resized crop and flip, decoded no larger than the crop needs.
"imagenet"  the recipe of timm: crop and flip, RandAugment, random erasing. timm's RandAugment uses the global
            generators of ``random`` and NumPy. They are seeded from the random key for each sample, and restored.

Each transform has two stages. ``pixels`` runs in the loader's workers and returns small tensors (uint8 wherever that is
exact). ``finish`` normalises them on the device of the model. For "none", "light" and evaluation, an image that already
has the target size is not resized.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mmtrain.data.core.buffers import Buffers
from mmtrain.data.core.source import Empty
from mmtrain.data.images.photo import Keys, Photo, Undecodable, erase, flips, random_crops, resized, uniform
from mmtrain.errors import UserError, nearest
from mmtrain.torchvision_compat import ensure_torchvision

if TYPE_CHECKING:
    from PIL.Image import Image

AUGMENTS = ("none", "light", "crop", "imagenet")

ROTATION = 10.0  # largest rotation in either direction, in degrees
SHIFT = 0.08  # largest shift in either direction, as a fraction of the side
SCALE = (0.9, 1.1)  # range of the scale

_buffers = Buffers()


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised tensor."""
    return torch.empty(tuple(shape), dtype=dtype)


class Transform(ABC):
    """Function of B images and their B random keys that returns a normalised batch, float32 (B, C, S, S).

    Images may be decoded or not. In evaluation, the keys are None.
    """

    normalise: Callable[[Tensor], Tensor]

    def __call__(self, images: Sequence[Photo | Image], keys: Keys | None) -> torch.Tensor:
        return self.finish(self.pixels(images, keys))

    @abstractmethod
    def pixels(self, images: Sequence[Photo | Image], keys: Keys | None, empty: Empty = new_tensor) -> torch.Tensor:
        """Return the pixels that ``finish`` normalises.

        Args:
            empty: function that allocates a tensor of uint8 pixels.

        Returns:
            uint8 (B, S, S, C), or float32 (B, C, S, S) in 0..1.

        Raises:
            Undecodable: if an image cannot be decoded.
        """

    def finish(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise the result of ``pixels``. The returned batch is in new memory on the same device."""
        return self.normalise(pixels)


def check_options(
    image_size: int, augment: str, mean: Sequence[float], std: Sequence[float], crop_pct: float, channels: int = 3
) -> None:
    """Raise UserError for invalid options of ``build_transform``. The message names the configuration keys."""
    if augment not in AUGMENTS:
        raise UserError(f"data.augment={augment!r}: must be one of {', '.join(AUGMENTS)}{nearest(augment, AUGMENTS)}")
    if image_size < 1 or not 0 < crop_pct <= 1:
        raise UserError(
            f"data.image_size={image_size}, data.crop_pct={crop_pct}: image_size must be at least 1, and crop_pct must "
            "be above 0 and at most 1"
        )
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(
            f"data.mean={list(mean)}, data.std={list(std)}: each must have {channels} value(s), and std must be above 0"
        )


def build_transform(
    train: bool,
    image_size: int,
    augment: str = "none",
    *,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int = 3,
    crop_pct: float = 0.875,
    hflip: float = 0.5,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    re_prob: float = 0.25,
) -> Transform:
    """Return the transform of one split.

    Args:
        train: use ``augment``. False: the transform for evaluation.
        image_size: side S of the batches, in pixels.
        augment: "none", "light", "crop" or "imagenet" (see the module).
        mean, std: mean and standard deviation per channel, for pixels in 0..1.
        channels: 3 (RGB) or 1 (grey).
        crop_pct: side of the centre crop as a fraction of the shorter side of the resized image ("none", "light" and
            evaluation).
        hflip: probability of a horizontal flip ("crop" and "imagenet").
        auto_augment: RandAugment or AutoAugment policy in timm's notation, "" for none ("imagenet").
        re_prob: probability of random erasing ("imagenet").

    Raises:
        UserError: for invalid options.
    """
    check_options(image_size, augment, mean, std, crop_pct, channels)
    if train and augment == "imagenet" and channels != 3:
        raise UserError(f"data.channels={channels}: data.augment=imagenet needs colour images. Set data.channels=3")
    normalise = Normalise(mean, std)
    if train and augment == "imagenet":
        distort = Distort(timm_policy(auto_augment, image_size, mean), re_prob, mean, std)
        return _Crop(normalise, image_size, channels, hflip, distort)
    if train and augment == "crop":
        return _Crop(normalise, image_size, channels, hflip)
    resize = _Resize(image_size, crop_pct, channels, normalise)
    return _Light(resize, mean, std) if train and augment == "light" else resize


class Normalise:
    """Compute (pixels / 255 - mean) / std per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        self.shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, C) → float32 (B, C, H, W), on the same device."""
        scale, shift = self.scale.float(), self.shift.float()
        if pixels.device.type != "cpu":
            wide = pixels.movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format)
            return wide.mul_(scale.to(wide.device).view(-1, 1, 1)).add_(shift.to(wide.device).view(-1, 1, 1))
        # One plane at a time stays in the CPU cache. NumPy is used, because torch would start threads on the cores that
        # the workers need. The memory is reused: new pages (38 MB for 64 photos) cost five times the arithmetic.
        b, h, w, c = pixels.shape
        out = _buffers.tensor((b, c, h, w), torch.float32)
        for source, target in zip(pixels.numpy(), out.numpy(), strict=True):
            for channel, (factor, term) in enumerate(zip(scale.numpy(), shift.numpy(), strict=True)):
                plane = target[channel]
                plane[...] = source[..., channel]
                plane *= factor
                plane += term
        return out


class _Resize(Transform):
    """Resize the shorter side to S / crop_pct, then crop the centre S × S."""

    def __init__(self, size: int, crop_pct: float, channels: int, normalise: Normalise) -> None:
        self.size, self.crop_pct, self.channels, self.normalise = size, crop_pct, channels, normalise
        self._resize: Any = None

    def pixels(self, images: Sequence[Photo | Image], keys: Keys | None, empty: Empty = new_tensor) -> torch.Tensor:
        made = empty((len(images), self.size, self.size, self.channels), torch.uint8)
        batch = made.numpy()
        for place, image in enumerate(images):
            try:
                whole = image.whole() if isinstance(image, Photo) else image
            except ValueError as error:
                raise Undecodable(place, error) from error
            fitting = whole if whole.size == (self.size, self.size) else self.resize(whole)
            batch[place] = np.asarray(fitting).reshape(batch[place].shape)
        return made

    def resize(self, image: Image) -> Image:
        if self._resize is None:
            ensure_torchvision()
            from timm.data import create_transform

            whole: Any = create_transform(self.size, normalize=False, crop_pct=self.crop_pct, interpolation="bicubic")
            self._resize = whole.transforms[:-1]  # without the conversion to a tensor
        for step in self._resize:
            image = step(image)
        return image


class Affine:
    """Small random rotation, scale and shift of a batch, float32 (B, C, S, S) in 0..1, followed by normalisation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, pixels: torch.Tensor, keys: Keys | None) -> torch.Tensor:
        return self.normalise(self.move(pixels, keys))

    def move(self, pixels: torch.Tensor, keys: Keys | None) -> torch.Tensor:
        """Return the transformed batch without normalisation (``keys`` None: ``pixels`` itself).

        The grid is computed with element-wise operations only. ``F.affine_grid`` multiplies matrices, and their
        rounding may depend on the number of samples in the batch, so the run would depend on the world size.
        """
        if keys is None:
            return pixels
        size = pixels.shape[-1]
        angle = np.deg2rad(ROTATION) * (2 * uniform(keys, 0) - 1)
        scale = SCALE[0] + (SCALE[1] - SCALE[0]) * uniform(keys, 1)
        # The side is 2 in grid coordinates. The grid maps output pixels to input positions, hence 1 / scale.
        shift_x, shift_y = (2 * SHIFT * (2 * uniform(keys, n) - 1) for n in (2, 3))
        cos, sin, move_x, move_y = (
            torch.from_numpy(values.astype(np.float32)).view(-1, 1, 1)
            for values in (np.cos(angle) / scale, np.sin(angle) / scale, shift_x, shift_y)
        )
        at = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
        x, y = at.view(1, 1, -1) - move_x, at.view(1, -1, 1) - move_y
        grid = torch.stack((cos * x - sin * y, sin * x + cos * y), dim=-1)
        return functional.grid_sample(pixels, grid, align_corners=False)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the normalised batch, in new memory."""
        return pixels.sub(self.mean.to(pixels.device)).div_(self.std.to(pixels.device))


class _Light(Transform):
    """Resize and centre crop, then a random affine transform of the decoded batch."""

    def __init__(self, resize: _Resize, mean: Sequence[float], std: Sequence[float]) -> None:
        self.resize, self.affine = resize, Affine(mean, std)
        self.normalise = self.affine.normalise

    def pixels(self, images: Sequence[Photo | Image], keys: Keys | None, empty: Empty = new_tensor) -> torch.Tensor:
        pixels = self.resize.pixels(images, None).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return self.affine.move(pixels, keys)


@dataclass
class _Crop(Transform):
    """Random resized crop and flip, then ``distort`` if it is given."""

    normalise: Normalise
    size: int
    channels: int
    hflip: float
    distort: Distort | None = None

    def pixels(self, images: Sequence[Photo | Image], keys: Keys | None, empty: Empty = new_tensor) -> torch.Tensor:
        if keys is None:
            raise ValueError("a random transform needs keys")
        made = empty((len(images), self.size, self.size, self.channels), torch.uint8)
        batch = made.numpy()
        photos = [image if isinstance(image, Photo) else Photo(b"", self.channels, image) for image in images]
        boxes, mirrored = random_crops(keys, [photo.size for photo in photos]), flips(keys, self.hflip)
        for place, (photo, box, mirror) in enumerate(zip(photos, boxes, mirrored.tolist(), strict=True)):
            try:
                part = photo.part(box, self.size)
            except ValueError as error:
                raise Undecodable(place, error) from error
            cropped = resized(part, self.size)
            batch[place] = cropped[:, ::-1] if mirror else cropped
        if self.distort is not None:
            self.distort(batch, keys)
        return made


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global generators of ``random`` and NumPy, which timm uses, at the end of the block."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@dataclass(frozen=True)
class Distort:
    """Apply ``policy`` (from :func:`timm_policy`), then random erasing, to uint8 pixels (B, S, S, C) in place."""

    policy: Any
    re_prob: float
    mean: Sequence[float]
    std: Sequence[float]

    def __call__(self, batch: NDArray[np.uint8], keys: Keys) -> None:
        if self.policy is not None:
            from PIL import Image

            with generators_kept():
                for row, key in zip(batch, keys.tolist(), strict=True):
                    random.seed(key)
                    np.random.seed(key & 0xFFFFFFFF)  # timm's RandAugment uses numpy's global generator
                    row[...] = np.asarray(self.policy(Image.fromarray(row)))
        erase(batch, keys, self.re_prob, self.mean, self.std)


def timm_policy(name: str, size: int, mean: Sequence[float]) -> Any:
    """Return timm's RandAugment or AutoAugment policy ``name``, with the default settings of timm ("": None).

    Args:
        name: policy in timm's notation.
        size: side of the images, in pixels.
        mean: mean per channel, for pixels in 0..1; it fills the areas outside of an image.

    Raises:
        UserError: for AugMix, which is not supported.
    """
    if not name:
        return None
    ensure_torchvision()
    from timm.data import auto_augment
    from timm.data.transforms import str_to_pil_interp

    for step in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[step] = _posterize
    options = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": str_to_pil_interp("bicubic"),
    }
    if name.startswith("augmix"):
        raise UserError(
            f"data.auto_augment={name!r}: AugMix is not supported. Use RandAugment (rand-...) or an AutoAugment policy"
        )
    make = auto_augment.rand_augment_transform if name.startswith("rand") else auto_augment.auto_augment_transform
    return make(name, options)


def _posterize(image: Image, bits: int, **_: Any) -> Image:
    """Posterize an image as Pillow 12 and earlier do.

    timm's strongest level keeps 0 bits. Published results used these versions, where this gives a black image. Pillow
    13 raises an error instead.
    """
    from PIL import Image as images
    from PIL import ImageOps

    if bits < 1:
        return images.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)
