"""PIL images → normalised float32 batches, with randomness that is a function of each sample's key alone.

"none"      no randomness: timm's resize and centre crop, as in evaluation.
"light"     small random affine (rotation, shift, scale) for digits and the like. Done on the decoded batch as tensors
            with parameters hashed from the keys: several times faster than PIL's affine at 32 × 32, and deterministic
            by construction. What moves in from outside is black.
"imagenet"  timm's recipe: random resized crop, flip, RandAugment, random erasing. timm draws from the global generators
            of ``random``, numpy and torch; they are seeded from the key for each sample and put back afterwards.

An image that already has the target size is not resized for "none", "light" and evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from mmtrain.compat import ensure_torchvision
from mmtrain.data.order import mix64
from mmtrain.errors import UserError, nearest

if TYPE_CHECKING:
    from PIL.Image import Image

AUGMENTS = ("none", "light", "imagenet")
Keys = NDArray[np.uint64]

ROTATION = 10.0  # degrees, both ways
SHIFT = 0.08  # of the side, both ways
SCALE = (0.9, 1.1)


class Transform(Protocol):
    """B images and their B keys (None: no randomness wanted) → float32 (B, C, S, S), normalised."""

    def __call__(self, images: Sequence[Image], keys: Keys | None) -> torch.Tensor: ...


def build_transform(
    train: bool,
    image_size: int,
    augment: str = "none",
    *,
    mean: Sequence[float],
    std: Sequence[float],
    channels: int = 3,
    crop_pct: float = 0.875,
    interpolation: str = "bicubic",
    hflip: float = 0.5,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    re_prob: float = 0.25,
) -> Transform:
    """The transform of one split. ``mean`` and ``std`` are per channel, for pixels in 0..1.

    ``crop_pct`` is the part of the resized image that the centre crop keeps ("none" and evaluation); ``hflip``,
    ``auto_augment`` (timm's notation, "" for none) and ``re_prob`` (random erasing) belong to "imagenet".
    """
    if augment not in AUGMENTS:
        raise UserError(f"data.augment={augment!r}: one of {', '.join(AUGMENTS)}{nearest(augment, AUGMENTS)}")
    if image_size < 1 or not 0 < crop_pct <= 1:
        raise UserError(f"data.image_size={image_size}, data.crop_pct={crop_pct}: a size ≥ 1 and a part in (0, 1]")
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(f"data.mean and data.std need {channels} value(s), std above 0; got {list(mean)}, {list(std)}")
    if train and augment == "imagenet":
        if channels != 3:
            raise UserError(f"data.augment=imagenet works on colour images: data.channels=3, not {channels}")
        return _ImageNet(image_size, mean, std, interpolation, hflip, auto_augment, re_prob)
    resize = _Resize(image_size, crop_pct, interpolation, mean, std, channels)
    return _Light(resize) if train and augment == "light" else resize


class _Resize:
    """Shorter side to S / crop_pct, then the centre S × S."""

    def __init__(
        self, size: int, crop_pct: float, interpolation: str, mean: Sequence[float], std: Sequence[float], channels: int
    ) -> None:
        self.size, self.channels = size, channels
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.options = {"crop_pct": crop_pct, "interpolation": interpolation}
        self._resize: Any = None

    def __call__(self, images: Sequence[Image], keys: Keys | None) -> torch.Tensor:
        return self.normalise(self.pixels(images))

    def pixels(self, images: Sequence[Image]) -> torch.Tensor:
        """float32 (B, C, S, S) in 0..1."""
        batch = np.empty((len(images), self.size, self.size, self.channels), dtype=np.uint8)
        for row, image in zip(batch, images, strict=True):
            resized = image if image.size == (self.size, self.size) else self.resize(image)
            row[...] = np.asarray(resized).reshape(row.shape)
        return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous().float().div_(255)

    def resize(self, image: Image) -> Image:
        if self._resize is None:
            create_transform = _timm()
            steps = create_transform(self.size, is_training=False, normalize=False, **self.options).transforms
            self._resize = steps[:-1]  # without the step to a tensor
        for step in self._resize:
            image = step(image)
        return image

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.sub_(self.mean).div_(self.std)


class _Light:
    """Random affine on the decoded batch."""

    def __init__(self, resize: _Resize) -> None:
        self.resize = resize

    def __call__(self, images: Sequence[Image], keys: Keys | None) -> torch.Tensor:
        pixels = self.resize.pixels(images)
        if keys is not None:
            pixels = functional.grid_sample(pixels, _affine_grid(keys, self.resize.size), align_corners=False)
        return self.resize.normalise(pixels)


def _affine_grid(keys: Keys, size: int) -> torch.Tensor:
    """Sampling grid (B, S, S, 2) of a rotation, scale and shift drawn for each key.

    Element-wise products and sums only: ``F.affine_grid`` multiplies matrices, whose rounding may depend on how many
    samples share the batch, and then the run would depend on the world size.
    """
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
    return torch.stack((cos * x - sin * y, sin * x + cos * y), dim=-1)


def uniform(keys: Keys, number: int) -> NDArray[np.float64]:
    """Draw ``number`` of each key, uniform in [0, 1), float64."""
    return (mix64(keys, number) >> np.uint64(11)).astype(np.float64) * 2.0**-53


class _ImageNet:
    """timm's training transform, image by image."""

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        hflip: float,
        auto_augment: str,
        re_prob: float,
    ) -> None:
        self.transform = _timm()(
            size,
            is_training=True,
            hflip=hflip,
            auto_augment=auto_augment or None,
            interpolation=interpolation,
            re_prob=re_prob,
            re_mode="pixel",
            mean=tuple(mean),
            std=tuple(std),
        )

    def __call__(self, images: Sequence[Image], keys: Keys | None) -> torch.Tensor:
        if keys is None:
            raise ValueError('the "imagenet" transform is random: it needs keys')
        out = []
        with _own_random_state():
            for image, key in zip(images, keys.tolist(), strict=True):
                random.seed(key)
                np.random.seed(key & 0xFFFFFFFF)  # timm's RandAugment uses numpy's global generator
                # Not torch.manual_seed: that would also re-seed the GPU of a process which loads its own data.
                torch.default_generator.manual_seed(key >> 1)
                out.append(self.transform(image))
        return torch.stack(out)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Put the caller's global random states back at the end."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _timm() -> Any:
    ensure_torchvision()
    from timm.data import auto_augment, create_transform

    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        auto_augment.NAME_TO_OP[name] = _posterize
    return create_transform


def _posterize(image: Image, bits: int, **_: Any) -> Image:
    """timm's strongest level keeps 0 bits: black in Pillow up to 12 and so in every published run, an error in 13."""
    from PIL import Image as images
    from PIL import ImageOps

    if bits < 1:
        return images.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)
