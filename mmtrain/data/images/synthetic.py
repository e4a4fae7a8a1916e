"""Images made up from their index: for tests, smoke runs and throughput measurements without files."""

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
    """Source of {"image": float32 (B, C, S, S), "label": int64 (B,)}: a wave pattern for each class plus unit noise.

    Sample i has label i mod ``num_classes``. Pure function of (seed, i): keys change nothing. Noise is a slice, at a
    hashed offset, of one tape of Gaussian numbers, so a sample costs a copy and one addition. Splits of one task share
    ``seed`` and take different ``first`` indices.
    """

    def __init__(
        self, num_classes: int, image_size: int, length: int, seed: int, channels: int = 3, first: int = 0
    ) -> None:
        if min(num_classes, image_size, length, channels) < 1:
            raise UserError("synthetic images need num_classes, image_size, length and channels of 1 or more")
        self.num_classes, self.length, self.seed, self.first = num_classes, length, seed, first
        self.shape = (channels, image_size, image_size)
        self.block_sizes = [length]
        self.patterns = self._patterns()
        # Box-Muller on hashed uniforms: the same numbers with every version of numpy and torch
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
        """(classes, C, S, S), root mean square near 1: a plane wave with its own direction and colour per class."""
        channels, size, _ = self.shape
        numbers = np.arange(self.num_classes * channels).reshape(self.num_classes, channels, 1, 1)
        waves, angle, phase = (uniform(self.seed, numbers, draw) for draw in range(3))
        y, x = np.meshgrid(np.arange(size) / size, np.arange(size) / size, indexing="ij")
        along = x * np.cos(2 * np.pi * angle) + y * np.sin(2 * np.pi * angle)
        return (math.sqrt(2) * np.sin(2 * np.pi * ((1 + 3 * waves) * along + phase))).astype(np.float32)
