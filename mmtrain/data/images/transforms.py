"""Images → normalised float32 batches, with randomness that is a function of each sample's key alone.

"none"      no randomness: timm's resize and centre crop, as in evaluation.
"light"     small random affine (rotation, shift, scale) for digits and the like. Done on the decoded batch as tensors
            with parameters hashed from the keys: several times faster than PIL's affine at 32 × 32, and deterministic
            by construction. What moves in from outside is black.
"crop"      random resized crop and flip, decoded no larger than the crop needs.
"imagenet"  the recipe of timm: crop and flip, RandAugment (timm's, which draws from the global generators of ``random``
            and numpy: they are seeded from the key for each sample and put back afterwards), random erasing.

Each transform has two halves: ``pixels`` makes small tensors in the loader's workers (uint8 wherever that is exact),
``finish`` normalises them where the model is. An image that already has the target size is not resized for "none",
"light" and evaluation.
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

ROTATION = 10.0  # degrees, both ways
SHIFT = 0.08  # of the side, both ways
SCALE = (0.9, 1.1)

_buffers = Buffers()


def new_tensor(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised."""
    return torch.empty(tuple(shape), dtype=dtype)


class Transform(ABC):
    """B images (decoded or not) and their B keys (None: no randomness wanted) → float32 (B, C, S, S), normalised."""

    normalise: Callable[[Tensor], Tensor]

    def __call__(self, images: Sequence[Photo | Image], keys: Keys | None) -> torch.Tensor:
        return self.finish(self.pixels(images, keys))

    @abstractmethod
    def pixels(self, images: Sequence[Photo | Image], keys: Keys | None, empty: Empty = new_tensor) -> torch.Tensor:
        """What ``finish`` takes: uint8 (B, S, S, C), in memory from ``empty``, or float32 (B, C, S, S) in 0..1.

        Raises Undecodable.
        """

    def finish(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalise what ``pixels`` made, on whatever device it is; into other memory."""
        return self.normalise(pixels)


def check_options(
    image_size: int, augment: str, mean: Sequence[float], std: Sequence[float], crop_pct: float, channels: int = 3
) -> None:
    """Raise UserError for options of ``build_transform`` that make no sense, by their keys."""
    if augment not in AUGMENTS:
        raise UserError(f"data.augment={augment!r}: one of {', '.join(AUGMENTS)}{nearest(augment, AUGMENTS)}")
    if image_size < 1 or not 0 < crop_pct <= 1:
        raise UserError(f"data.image_size={image_size}, data.crop_pct={crop_pct}: a size ≥ 1 and a part in (0, 1]")
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(f"data.mean and data.std need {channels} value(s), std above 0; got {list(mean)}, {list(std)}")


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
    """The transform of one split. ``mean`` and ``std`` are per channel, for pixels in 0..1.

    ``crop_pct`` is the part of the resized image that the centre crop keeps ("none" and evaluation); ``hflip`` belongs
    to "crop" and "imagenet", ``auto_augment`` (timm's notation, "" for none) and ``re_prob`` (random erasing) to the
    latter.
    """
    check_options(image_size, augment, mean, std, crop_pct, channels)
    if train and augment == "imagenet" and channels != 3:
        raise UserError(f"data.augment=imagenet works on colour images: data.channels=3, not {channels}")
    normalise = Normalise(mean, std)
    if train and augment == "imagenet":
        distort = Distort(timm_policy(auto_augment, image_size, mean), re_prob, mean, std)
        return _Crop(normalise, image_size, channels, hflip, distort)
    if train and augment == "crop":
        return _Crop(normalise, image_size, channels, hflip)
    resize = _Resize(image_size, crop_pct, channels, normalise)
    return _Light(resize, mean, std) if train and augment == "light" else resize


class Normalise:
    """(pixels / 255 - mean) / std, per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.scale = 1 / (255 * torch.tensor(std, dtype=torch.float64))
        self.shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 (B, H, W, C) → float32 (B, C, H, W), on the same device."""
        scale, shift = self.scale.float(), self.shift.float()
        if pixels.device.type != "cpu":
            wide = pixels.movedim(-1, 1).to(torch.float32, memory_format=torch.contiguous_format)
            return wide.mul_(scale.to(wide.device).view(-1, 1, 1)).add_(shift.to(wide.device).view(-1, 1, 1))
        # One plane at a time, which stays in the cache, and by numpy: torch would wake threads for each, which the
        # workers need. The memory is used again: fresh pages (38 MB for 64 photos) cost five times the arithmetic.
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
    """Shorter side to S / crop_pct, then the centre S × S."""

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
            self._resize = whole.transforms[:-1]  # without the step to a tensor
        for step in self._resize:
            image = step(image)
        return image


class Affine:
    """A small random rotation, scale and shift of a batch float32 (B, C, S, S) in 0..1, and its normalisation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)

    def __call__(self, pixels: torch.Tensor, keys: Keys | None) -> torch.Tensor:
        return self.normalise(self.move(pixels, keys))

    def move(self, pixels: torch.Tensor, keys: Keys | None) -> torch.Tensor:
        """Without keys, ``pixels`` itself.

        The grid takes element-wise products and sums only: ``F.affine_grid`` multiplies matrices, whose rounding may
        depend on how many samples share the batch, and then the run would depend on the world size.
        """
        if keys is None:
            return pixels
        size = pixels.shape[-1]
        angle = np.deg2rad(ROTATION) * (2 * uniform(keys, 0) - 1)
        scale = SCALE[0] + (SCALE[1] - SCALE[0]) * uniform(keys, 1)
        # Side = 2 in grid coordinates. The grid says where each output pixel comes from: hence 1 / scale.
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
        """Into other memory."""
        return pixels.sub(self.mean.to(pixels.device)).div_(self.std.to(pixels.device))


class _Light(Transform):
    """Random affine on the decoded batch."""

    def __init__(self, resize: _Resize, mean: Sequence[float], std: Sequence[float]) -> None:
        self.resize, self.affine = resize, Affine(mean, std)
        self.normalise = self.affine.normalise

    def pixels(self, images: Sequence[Photo | Image], keys: Keys | None, empty: Empty = new_tensor) -> torch.Tensor:
        pixels = self.resize.pixels(images, None).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return self.affine.move(pixels, keys)


@dataclass
class _Crop(Transform):
    """Random resized crop and flip, then ``distort`` where that is wanted."""

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
    """Give the global generators of ``random`` and numpy, which timm draws from, their states back at the end."""
    states = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@dataclass(frozen=True)
class Distort:
    """``policy`` (of :func:`timm_policy`), then random erasing, of bytes (B, S, S, C), in place."""

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
    """timm's RandAugment or AutoAugment, with the settings that its own factory gives it; None for no name."""
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
        raise UserError(f"auto_augment {name!r}: AugMix is not supported; use rand-... or a policy of AutoAugment")
    make = auto_augment.rand_augment_transform if name.startswith("rand") else auto_augment.auto_augment_transform
    return make(name, options)


def _posterize(image: Image, bits: int, **_: Any) -> Image:
    """timm's strongest level keeps 0 bits: black in Pillow up to 12 and so in every published run, an error in 13."""
    from PIL import Image as images
    from PIL import ImageOps

    if bits < 1:
        return images.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)
