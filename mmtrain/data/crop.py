"""Random resized crop, flip and erasing as functions of samples' keys: the usual distributions, any number of workers.

The crop is that of Szegedy et al. 2015 as torchvision and timm draw it, the erasing that of Zhong et al. 2017 as timm
does; only where the random numbers come from is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.order import mix64
from mmtrain.data.photo import Box

Keys = NDArray[np.uint64]

#: Of a random resized crop: part of the area, width over height, tries before the middle of the image.
SCALE, RATIO, TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
#: Draws of a key: crops take the first 4 · tries, then the flip; erasing and everything else begins at 64.
FLIP_DRAW, _ERASE = 4 * TRIES, 64


def uniform(keys: Keys, number: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """Draw ``number`` of each key (broadcast), uniform in [0, 1), float64."""
    return (mix64(keys, number) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def random_crops(
    keys: Keys,
    sizes: Sequence[tuple[int, int]],
    scale: tuple[float, float] = SCALE,
    ratio: tuple[float, float] = RATIO,
) -> list[Box]:
    """For each key and (width, height) a box of ``scale`` of the area, its width to height log-uniform in ``ratio``.

    Ten tries; then the largest box within ``ratio`` in the middle.
    """
    if not len(keys):
        return []
    draws = uniform(keys[:, None], np.arange(4 * TRIES)).reshape(len(keys), TRIES, 4)
    whole = np.asarray(sizes, dtype=np.float64).reshape(-1, 2, 1)
    area = whole[:, 0] * whole[:, 1] * (scale[0] + (scale[1] - scale[0]) * draws[..., 0])
    aspect = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * draws[..., 1])
    width, height = np.floor(np.sqrt(area * aspect) + 0.5), np.floor(np.sqrt(area / aspect) + 0.5)
    fits = (width <= whole[:, 0]) & (height <= whole[:, 1]) & (np.minimum(width, height) >= 1)
    top = np.floor(draws[..., 2] * (whole[:, 1] - height + 1))
    left = np.floor(draws[..., 3] * (whole[:, 0] - width + 1))
    boxes = np.stack([left, top, width, height], -1).astype(np.int64)
    first = fits.argmax(1)
    return [
        Box(*boxes[n, first[n]].tolist()) if fits[n, first[n]] else _middle(size, ratio) for n, size in enumerate(sizes)
    ]


def _middle(size: tuple[int, int], ratio: tuple[float, float]) -> Box:
    width, height = size
    if width / height < ratio[0]:
        height = min(height, max(1, int(width / ratio[0] + 0.5)))
    elif width / height > ratio[1]:
        width = min(width, max(1, int(height * ratio[1] + 0.5)))
    return Box((size[0] - width) // 2, (size[1] - height) // 2, width, height)


def flips(keys: Keys, probability: float) -> NDArray[np.bool_]:
    """Which samples are mirrored."""
    return uniform(keys, FLIP_DRAW) < probability


def erase(
    pixels: NDArray[np.uint8], keys: Keys, probability: float, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Fill a rectangle of some images with noise, in place: pixels (B, S, S, C).

    2 to 33 % of the area, its height to width log-uniform in 0.3 to 1/0.3, noise normal around ``mean`` with ``std``
    (of pixels in 0..1), cut off at black and white.
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
            # the one generator of numpy whose stream is promised to stay
            noise = np.random.RandomState(int(keys[n]) & 0xFFFFFFFF).standard_normal((height, width, len(mean)))
            values = np.rint(255 * (np.asarray(mean) + np.asarray(std) * noise))
            pixels[n, top : top + height, left : left + width] = values.clip(0, 255)
            break
