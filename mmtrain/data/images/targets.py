"""Samples with targets other than a class: an image with its mask, or an image with its boxes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmtrain.data.images.formats import open_image
from mmtrain.data.images.tar_index import IMAGE_SUFFIXES
from mmtrain.data.images.tar_members import open_shard, read_members
from mmtrain.errors import UserError

_CURE = "Copy or prepare the shard again"
Sample = Mapping[str, bytes]


@dataclass(frozen=True)
class Detection:
    """The n annotations of one image, in pixels of the stored image."""

    image_id: int
    size: tuple[int, int]  # (W, H)
    boxes: NDArray[np.float32]  # (n, 4): left, top, right, bottom
    labels: NDArray[np.int64]  # (n,) class indices
    areas: NDArray[np.float32]  # (n,) areas of the outlines
    crowd: NDArray[np.bool_]  # (n,) True: the annotation covers many objects
    outlines: list[Any]  # n outlines: polygons [[x, y, x, y, ...], ...], or COCO's RLE {"size": [H, W], "counts": ...}


def read_samples(shard: str | Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the key and the members (suffix → bytes) of each sample of a tar shard, in order.

    Raises:
        UserError: if the shard is damaged.
    """
    with open_shard(shard) as stream:
        key, members = "", dict[str, bytes]()
        for member in read_members(shard, stream):
            name = member.name.rpartition("/")[2]
            here = member.name[: len(member.name) - len(name)] + name.partition(".")[0]
            if members and here != key:
                yield key, members
                members = {}
            key = here
            members[name.partition(".")[2].lower()] = os.pread(stream.fileno(), member.size, member.offset_data)
        if members:
            yield key, members


def read_mask(sample: Sample) -> tuple[bytes, NDArray[np.uint8]]:
    """Return the image file and the mask (class number of each pixel, (H, W)) of a sample with a ``.seg.png``.

    Raises:
        UserError: if a member is missing or damaged.
    """
    content = _member(sample, "seg.png", "mmtrain data prepare segmentation")
    try:
        with open_image(content) as image:
            if image.mode != "L":
                raise ValueError(f"its mode is {image.mode}, not L (8-bit grey)")
            mask = np.array(image)
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise almost anything for damaged files
        raise UserError(f".seg.png: the mask cannot be decoded ({error}). {_CURE}") from error
    return image_bytes(sample), mask


def read_detection(sample: Sample) -> tuple[bytes, Detection]:
    """Return the image file and the annotations of a sample with a ``.json`` written by ``mmtrain data prepare coco``.

    Raises:
        UserError: if a member is missing or damaged.
    """
    content = _member(sample, "json", "mmtrain data prepare coco")
    try:
        found = json.loads(content)
        count = len(found["labels"])
        detection = Detection(
            int(found["image_id"]),
            (int(found["width"]), int(found["height"])),
            np.array(found["boxes"], dtype=np.float32).reshape(count, 4),
            np.array(found["labels"], dtype=np.int64),
            np.array(found["areas"], dtype=np.float32).reshape(count),
            np.array(found["iscrowd"], dtype=np.bool_).reshape(count),
            list(found["segmentations"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f".json: not valid annotations of an image ({error!r}). {_CURE}") from error
    return image_bytes(sample), detection


def image_bytes(sample: Sample) -> bytes:
    """Return the image file of a sample. Raises UserError unless the sample has exactly one."""
    found = [sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample]
    if len(found) != 1:
        raise UserError(
            f"a sample with the members {', '.join(sorted(sample))} must have exactly one image, not {len(found)}. "
            f"{_CURE}"
        )
    return found[0]


def _member(sample: Sample, suffix: str, command: str) -> bytes:
    if suffix not in sample:
        raise UserError(
            f"a sample with the members {', '.join(sorted(sample))} has no .{suffix}. Create shards with `{command}`"
        )
    return sample[suffix]
