"""Draws of a sample inside compiled code: the hash of the data clock (``order.mix64``), and what is drawn with it.

Compiled without fastmath: a crop must not move by a pixel because two builds of the code round differently.

The compiled part: decode, crop, flip and normalise one sample at a time, by the sample's key alone.

Beside FFCV's own RandomResizedCropRGBImageDecoder, RandomHorizontalFlip, NormalizeImage and ToTorchImage, with whose
library it decodes and resizes:
- the randomness is hashed from the keys, and not numpy's global generator in whichever thread comes by;
- all four steps are done while the image is in the cache, and the result lies as (C, H, W);
- an image that cannot be decoded is reported, where FFCV leaves what was in memory before.

Resizing is FFCV's (OpenCV's area interpolation; linear where it enlarges), and so differs from the bicubic of the tar
shards; its JPEG decoder takes the fast transform, a few grey levels from Pillow's. Evaluation otherwise has timm's
geometry: shorter side to S / crop_pct, then the centre S × S.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from ffcv.libffcv import imdecode, resize_crop

from mmtrain.data.ffcv.augment import Recipe
from mmtrain.data.ffcv.format import JPG
from mmtrain.data.images.photo import FLIP_DRAW, RATIO, SCALE, TRIES

_GOLDEN, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_27, _30, _31, _11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)
_LOG_LOW, _LOG_HIGH = math.log(RATIO[0]), math.log(RATIO[1])
_njit = numba.njit(nogil=True, error_model="numpy")


@_njit
def mixed(state, value):  # type: ignore[no-untyped-def]  # numba infers: uint64, uint64 -> uint64
    """One step of ``order.mix64``."""
    state = (state ^ value) + _GOLDEN
    state = (state ^ (state >> _30)) * _FIRST
    state = (state ^ (state >> _27)) * _SECOND
    return state ^ (state >> _31)


@_njit
def draw(key, number):  # type: ignore[no-untyped-def]  # uint64, int -> float64
    """Draw ``number`` of a key, uniform in [0, 1): ``transforms.uniform`` of one key."""
    return np.float64(mixed(mixed(np.uint64(0), key), np.uint64(number)) >> _11) * 2.0**-53


@_njit
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


@_njit
def flipped(key, probability):  # type: ignore[no-untyped-def]  # uint64, float64 -> bool
    """Whether a sample is mirrored."""
    return draw(key, FLIP_DRAW) < probability


# No fastmath: the bits must not depend on how the code was compiled.
_options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_compiled = numba.njit(**_options)
_decode_jpg = _compiled(imdecode)
_resize = _compiled(resize_crop)


def compile_decoder(recipe: Recipe, mapped: bool, parallel: bool) -> Callable[..., None]:
    """``decode(indices, keys, images, faults, rows, state)``, compiled at its first call.

    int64 (B,), uint64 (B,), ``recipe.shape(B)``, uint8 (B,): 1 for an image that cannot be decoded. ``rows``: those of
    ``format.Beton``. ``state``: the file's bytes if ``mapped``, else pages (slots, page size), the slot of each page,
    and log2 of the page size.
    """
    read = _read_mapped if mapped else _read_paged
    cropped, finish = _cropped(recipe), _finisher(recipe)

    @numba.njit(**_options, parallel=parallel)
    def decode(indices, keys, images, faults, rows, state):  # type: ignore[no-untyped-def]
        modes, heights, widths, places, sizes = rows
        for slot in numba.prange(len(indices)):
            sample = indices[slot]
            height, width = heights[sample], widths[sample]
            content = read(state, places[sample], sizes[sample])
            faults[slot] = 1
            # Two calls: a mapped file cannot be written, which is another type to numba.
            if modes[sample] == JPG:
                image = np.empty((height, width, 3), np.uint8)
                if _decode_jpg(content, image, height, width, height, width, 0, 0, 1, 1, False, False) == 0:
                    finish(cropped(image, height, width, keys[slot]), keys[slot], images[slot])
                    faults[slot] = 0
            elif content.size == height * width * 3:
                stored = content.reshape(height, width, 3)
                finish(cropped(stored, height, width, keys[slot]), keys[slot], images[slot])
                faults[slot] = 0

    return decode


@_compiled
def _read_mapped(state, place, size):  # type: ignore[no-untyped-def]
    return state[place : place + size]


@_compiled
def _read_paged(state, place, size):  # type: ignore[no-untyped-def]
    pages, slots, shift = state
    page = place >> shift
    begin = place - (page << shift)
    return pages[np.int64(slots[page]), begin : begin + size]


def _cropped(recipe: Recipe) -> Callable[..., Any]:
    """image, height, width, key → (S, S, 3) uint8."""
    size = recipe.size
    shorter = math.floor(size / recipe.crop_pct)

    @_compiled
    def at_random(image, height, width, key):  # type: ignore[no-untyped-def]
        top, left, high, wide = crop_box(key, height, width)
        patch = np.empty((size, size, 3), np.uint8)
        _resize(image, top, top + high, left, left + wide, patch)
        return patch

    @_compiled
    def centre(image, height, width, key):  # type: ignore[no-untyped-def]
        patch = np.empty((size, size, 3), np.uint8)
        if height == size and width == size:
            patch[:] = image
            return patch
        if height <= width:
            high, wide = shorter, shorter * width // height
        else:
            high, wide = shorter * height // width, shorter
        whole = np.empty((high, wide, 3), np.uint8)
        _resize(image, 0, height, 0, width, whole)
        top, left = np.int64(np.round((high - size) / 2)), np.int64(np.round((wide - size) / 2))
        patch[:] = whole[top : top + size, left : left + size]
        return patch

    return at_random if recipe.random else centre


def _finisher(recipe: Recipe) -> Callable[..., Any]:
    """patch (S, S, 3) uint8, key, target: flips where that is wanted, and looks the values up."""
    size, hflip = recipe.size, recipe.hflip if recipe.random else 0.0

    if recipe.table is None:

        @_compiled
        def keep(patch, key, target):  # type: ignore[no-untyped-def]
            if flipped(key, hflip):
                target[:] = patch[:, ::-1]
            else:
                target[:] = patch

        return keep

    red, green, blue = (np.ascontiguousarray(values) for values in recipe.table)

    @_compiled
    def look_up(patch, key, target):  # type: ignore[no-untyped-def]
        mirror = flipped(key, hflip)
        for y in range(size):
            for x in range(size):
                at = size - 1 - x if mirror else x
                target[0, y, x] = red[patch[y, at, 0]]
                target[1, y, x] = green[patch[y, at, 1]]
                target[2, y, x] = blue[patch[y, at, 2]]

    return look_up
