"""FFCV's decoder for the data clock: decode, crop, flip and normalise one sample at a time, by the sample's key alone.

Beside FFCV's own RandomResizedCropRGBImageDecoder, RandomHorizontalFlip, NormalizeImage and ToTorchImage:
- the randomness is hashed from the keys, and not numpy's global generator in whichever thread comes by;
- all four steps are done while the image is in the cache, and the result lies as (C, H, W);
- an image that cannot be decoded is reported, where FFCV leaves what was in memory before.

Resizing is FFCV's (OpenCV's area interpolation; linear where it enlarges), and so differs from the bicubic of the tar
shards. Evaluation otherwise has timm's geometry: shorter side to S / crop_pct, then the centre S × S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numba
import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.libffcv import imdecode, resize_crop
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from mmtrain.data.beton.augment import Recipe
from mmtrain.data.beton.draws import crop_box, flipped

_compiled = numba.njit(nogil=True, error_model="numpy")
_JPG = int(IMAGE_MODES["jpg"])
_decode_jpg = _compiled(imdecode)
_resize = _compiled(resize_crop)


class KeyedDecoder(Operation):
    """Its memory, given by ``engine.Engine``: images (``recipe.shape``), keys (B,) uint64, faults (B,) uint8."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, None]:
        size = self.recipe.size
        return replace(previous_state, jit_mode=True, shape=(size, size, 3), dtype=np.dtype(np.uint8)), None

    def generate_code(self) -> Callable[..., Any]:
        read, each = self.memory_read, Compiler.get_iterator()
        write = _writer(self.recipe)

        def decode(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
            images, keys, faults = memory
            for place in each(len(batch_indices)):
                field = metadata[batch_indices[place]]
                content = read(field["data_ptr"], storage_state)
                height, width = np.int64(field["height"]), np.int64(field["width"])
                faults[place] = write(content, field["mode"], height, width, keys[place], images[place])
            return faults

        decode.is_parallel = True  # type: ignore[attr-defined]  # how ffcv wants to be told
        return decode


def _writer(recipe: Recipe) -> Callable[..., Any]:
    """content, mode, height, width, key, target → 0, or 1 for an image that cannot be decoded."""
    pixels = _cropped(recipe)
    finish = _finisher(recipe)

    @_compiled
    def write(content, mode, height, width, key, target):  # type: ignore[no-untyped-def]
        if mode == _JPG:
            image = np.empty((height, width, 3), np.uint8)
            if _decode_jpg(content, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                return 1
        else:
            if content.size != height * width * 3:
                return 1
            image = content.reshape(height, width, 3)
        finish(pixels(image, height, width, key), key, target)
        return 0

    return write


def _cropped(recipe: Recipe) -> Callable[..., Any]:
    """image, height, width, key → (S, S, 3) uint8."""
    size = recipe.size
    shorter = int(np.floor(size / recipe.crop_pct))

    @_compiled
    def at_random(image, height, width, key):  # type: ignore[no-untyped-def]
        top, left, high, wide = crop_box(key, height, width)
        patch = np.empty((size, size, 3), np.uint8)
        _resize(image, top, top + high, left, left + wide, patch)
        return patch

    @_compiled
    def centre(image, height, width, key):  # type: ignore[no-untyped-def]
        if height == size and width == size:
            return image
        if height <= width:
            high, wide = shorter, shorter * width // height
        else:
            high, wide = shorter * height // width, shorter
        whole = np.empty((high, wide, 3), np.uint8)
        _resize(image, 0, height, 0, width, whole)
        top, left = np.int64(np.round((high - size) / 2)), np.int64(np.round((wide - size) / 2))
        patch = np.empty((size, size, 3), np.uint8)
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
