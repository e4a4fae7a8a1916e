"""Transforms of the images in a beton, for training and evaluation.

"none"      as in evaluation: resize and centre crop.
"light"     the small random affine transform of ``transforms``, on the decoded batch.
"crop"      random resized crop and flip (the recipe of FFCV), fully compiled.
"imagenet"  compiled crop and flip, then timm's RandAugment and random erasing for each image, as for tar shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmtrain.data.images.photo import Keys
from mmtrain.data.images.transforms import Affine, Distort, Normalise, check_options, timm_policy

#: Function of a decoded batch (``Recipe.shape``) and its random keys that returns float32 (B, 3, S, S), normalised.
Finish = Callable[[torch.Tensor, Keys | None], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """The compiled part of a transform."""

    size: int  # side of the images, in pixels
    random: bool  # True: random resized crop and flip; False: resize and centre crop
    crop_pct: float = 0.875  # of the centre crop
    hflip: float = 0.5  # probability of a flip
    table: NDArray[np.float32] | None = None  # (3, 256) output value of each channel and byte; None: output bytes

    def shape(self, count: int) -> tuple[int, ...]:
        """Return the shape of a batch: (B, 3, S, S) float32 with a table, (B, S, S, 3) uint8 without."""
        return (count, self.size, self.size, 3) if self.table is None else (count, 3, self.size, self.size)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.table is None else np.float32)


@dataclass(frozen=True)
class Augment:
    """A transform: a compiled part and an optional part in Python."""

    recipe: Recipe
    finish: Finish | None = None  # applied after the compiled part
    compiled: bool = True  # False: cannot run in a thread, because timm uses the global generators of the process


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
    """Return the transform of one split. The arguments are those of ``transforms.build_transform``."""
    check_options(image_size, augment, mean, std, crop_pct)
    normalise = Normalise(mean, std)
    # Computed with the code for tar shards, so that the same bytes give bit-identical values.
    levels = torch.arange(256, dtype=torch.uint8).view(1, 256, 1, 1).expand(1, 256, 1, 3)
    table = normalise(levels)[0, :, :, 0].numpy().copy()
    if not train or augment == "none":
        return Augment(Recipe(image_size, False, crop_pct, table=table))
    if augment == "light":
        fractions = torch.arange(256, dtype=torch.float32).div_(255).repeat(3, 1).numpy()
        return Augment(Recipe(image_size, False, crop_pct, table=fractions), Affine(mean, std))
    if augment == "crop":
        return Augment(Recipe(image_size, True, hflip=hflip, table=table))
    distort = Distort(timm_policy(auto_augment, image_size, mean), re_prob, mean, std)
    return Augment(Recipe(image_size, True, hflip=hflip), _Distorted(distort, normalise), compiled=False)


@dataclass(frozen=True)
class _Distorted:
    """RandAugment and random erasing of uint8 pixels (B, S, S, 3), as for tar shards, then normalisation."""

    distort: Distort
    normalise: Normalise

    def __call__(self, images: torch.Tensor, keys: Keys | None) -> torch.Tensor:
        if keys is None:
            raise ValueError('the "imagenet" transform is random and needs random keys')
        self.distort(images.numpy(), keys)
        return self.normalise(images)
