"""Images generated from their index, for tests and throughput measurements without files."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from mmtrain.data.core.order import mix64
from mmtrain.data.images.photo import uniform
from mmtrain.errors import UserError

_TAPE = 1 << 16


class SyntheticImages:
    """Data source of generated images: {"image": float32 (B, C, S, S), "label": int64 (B,)}.

    An image is the wave pattern of its class plus unit Gaussian noise. Sample i has label i mod ``num_classes``, and is
    a pure function of (seed, i): random keys are ignored. The noise is a slice, at a hashed offset, of one array of
    Gaussian numbers, so a sample costs a copy and an addition.

    Args:
        length: number of samples.
        first: index of the first sample. Splits of one task use the same ``seed`` and disjoint ranges of indices.
    """

    def __init__(
        self, num_classes: int, image_size: int, length: int, seed: int, channels: int = 3, first: int = 0
    ) -> None:
        if min(num_classes, image_size, length, channels) < 1:
            raise UserError("synthetic images: num_classes, image_size, length and channels must each be at least 1")
        self.num_classes, self.length, self.seed, self.first = num_classes, length, seed, first
        self.shape = (channels, image_size, image_size)
        self.block_sizes = [length]
        self.patterns = self._patterns()
        # Box-Muller transform of hashed uniform numbers: the same noise in every version of NumPy and torch.
        u, v = (uniform(seed, np.arange(math.prod(self.shape) + _TAPE), draw) for draw in (11, 12))
        self.noise = (np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)).astype(np.float32)

    def __len__(self) -> int:
        return self.length

    def fetch(self, indices: NDArray[np.int64], keys: NDArray[np.uint64] | None) -> dict[str, torch.Tensor]:
        samples = np.asarray(indices, dtype=np.int64) + self.first
        labels = samples % self.num_classes
        offsets = (mix64(self.seed, samples) % np.uint64(_TAPE)).astype(np.int64)
        size = math.prod(self.shape)
        image = self.patterns[labels]  # a copy
        for row, offset in zip(image, offsets.tolist(), strict=True):
            row += self.noise[offset : offset + size].reshape(self.shape)
        return {"image": torch.from_numpy(image), "label": torch.from_numpy(labels)}

    def _patterns(self) -> NDArray[np.float32]:
        """Return the patterns (classes, C, S, S): a plane wave per class and channel, with a root mean square near 1.

        Wave number, direction and phase are hashed from the class and the channel.
        """
        channels, size, _ = self.shape
        numbers = np.arange(self.num_classes * channels).reshape(self.num_classes, channels, 1, 1)
        waves, angle, phase = (uniform(self.seed, numbers, draw) for draw in range(3))
        y, x = np.meshgrid(np.arange(size) / size, np.arange(size) / size, indexing="ij")
        along = x * np.cos(2 * np.pi * angle) + y * np.sin(2 * np.pi * angle)
        return (math.sqrt(2) * np.sin(2 * np.pi * ((1 + 3 * waves) * along + phase))).astype(np.float32)
