"""Draws of a sample inside compiled code: the hash of the data clock (``order.mix64``), and what is drawn with it.

Compiled without fastmath: a crop must not move by a pixel because two builds of the code round differently.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from mmtrain.data.crop import FLIP_DRAW, RATIO, SCALE, TRIES

_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
_LOG_LOW, _LOG_HIGH = math.log(RATIO[0]), math.log(RATIO[1])
_compiled = numba.njit(nogil=True, error_model="numpy")


@_compiled
def mixed(state, value):  # type: ignore[no-untyped-def]  # numba infers: uint64, uint64 -> uint64
    """One step of ``order.mix64``."""
    state = (state ^ value) + _GOLDEN
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    return state ^ (state >> _31)


@_compiled
def draw(key, number):  # type: ignore[no-untyped-def]  # uint64, int -> float64
    """Draw ``number`` of a key, uniform in [0, 1): ``transforms.uniform`` of one key."""
    return np.float64(mixed(mixed(np.uint64(0), key), np.uint64(number)) >> _11) * 2.0**-53


@_compiled
def crop_box(key, height, width):  # type: ignore[no-untyped-def]  # uint64, int64, int64 -> four int64
    """Top, left, height and width of the random resized crop of an image; sizes in pixels."""
    area = np.float64(height) * np.float64(width)
    for attempt in range(TRIES):
        target = area * (SCALE[0] + (SCALE[1] - SCALE[0]) * draw(key, 4 * attempt))
        ratio = math.exp(_LOG_LOW + (_LOG_HIGH - _LOG_LOW) * draw(key, 4 * attempt + 1))
        wide = np.int64(math.floor(math.sqrt(target * ratio) + 0.5))
        high = np.int64(math.floor(math.sqrt(target / ratio) + 0.5))
        if 0 < wide <= width and 0 < high <= height:
            top = np.int64(draw(key, 4 * attempt + 2) * (height - high + 1))
            left = np.int64(draw(key, 4 * attempt + 3) * (width - wide + 1))
            return top, left, high, wide
    wide, high = width, height
    if width < RATIO[0] * height:
        high = min(height, max(np.int64(1), np.int64(math.floor(width / RATIO[0] + 0.5))))
    elif width > RATIO[1] * height:
        wide = min(width, max(np.int64(1), np.int64(math.floor(height * RATIO[1] + 0.5))))
    return (height - high) // 2, (width - wide) // 2, high, wide


@_compiled
def flipped(key, probability):  # type: ignore[no-untyped-def]  # uint64, float64 -> bool
    """Whether a sample is mirrored."""
    return draw(key, FLIP_DRAW) < probability
