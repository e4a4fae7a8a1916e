"""What is made of an image from a beton, in training and evaluation.

"none"      as in evaluation: resize and centre crop.
"light"     the small random affine of ``transforms``, on the decoded batch.
"crop"      random resized crop and flip, FFCV's own recipe: all of it compiled.
"imagenet"  crop and flip compiled, then timm's RandAugment and random erasing, image by image as for the tar shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmtrain.data.images.photo import Keys
from mmtrain.data.images.transforms import Affine, Distort, Normalise, check_options, timm_policy

#: A decoded batch (``Recipe.shape``) and its keys → float32 (B, 3, S, S), normalised.
Finish = Callable[[torch.Tensor, Keys | None], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """The compiled part. ``random``: random resized crop and flip; else resize and centre crop.

    ``table``: float32 (3, 256), a value for each byte of each channel; None: bytes are wanted.
    """

    size: int
    random: bool
    crop_pct: float = 0.875
    hflip: float = 0.5
    table: NDArray[np.float32] | None = None

    def shape(self, count: int) -> tuple[int, ...]:
        """(B, 3, S, S) float32 with a table, (B, S, S, 3) uint8 without."""
        return (count, self.size, self.size, 3) if self.table is None else (count, 3, self.size, self.size)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.table is None else np.float32)


@dataclass(frozen=True)
class Augment:
    """``finish``: what comes after the compiled part; None where that is all. ``compiled``: whether a thread can do it
    beside the training (timm's transforms draw from the generators of the process).
    """

    recipe: Recipe
    finish: Finish | None = None
    compiled: bool = True


def build_augment(
    train: bool,
    image_size: int,
    augment: str = "none",
    *,
    mean: Sequence[float],
    std: Sequence[float],
    crop_pct: float = 0.875,
    hflip: float = 0.5,
    auto_augment: str = "rand-m9-mstd0.5-inc1",
    re_prob: float = 0.25,
) -> Augment:
    """The recipe of one split; the options are those of ``transforms.build_transform``."""
    check_options(image_size, augment, mean, std, crop_pct)
    normalise = Normalise(mean, std)
    # by the very steps of the tar shards' path, so that the same bytes give the same bits
    levels = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 1, 3)
    table = normalise(levels)[0, :, :, 0].numpy().copy()
    if not train or augment == "none":
        return Augment(Recipe(image_size, False, crop_pct, table=table))
    if augment == "light":
        parts = torch.arange(256, dtype=torch.float32).div_(255).repeat(3, 1).numpy()
        return Augment(Recipe(image_size, False, crop_pct, table=parts), Affine(mean, std))
    if augment == "crop":
        return Augment(Recipe(image_size, True, hflip=hflip, table=table))
    distort = Distort(timm_policy(auto_augment, image_size, mean), re_prob, mean, std)
    return Augment(Recipe(image_size, True, hflip=hflip), _Distorted(distort, normalise), compiled=False)


@dataclass(frozen=True)
class _Distorted:
    """RandAugment and random erasing on bytes (B, S, S, 3), as for the tar shards, then normalised."""

    distort: Distort
    normalise: Normalise

    def __call__(self, images: torch.Tensor, keys: Keys | None) -> torch.Tensor:
        if keys is None:
            raise ValueError('the "imagenet" transform is random: it needs keys')
        self.distort(images.numpy(), keys)
        return self.normalise(images)
