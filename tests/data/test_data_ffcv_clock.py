"""FFCV on the data clock: the samples of the shards, at their steps (what else holds: test_data_every_source.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beton_cases import LOOK, Made

from mmtrain.data.core.loader import train_batches
from mmtrain.data.core.source import Source, Streaming
from mmtrain.data.images.shards import ImageShards


def test_a_beton_is_a_source_that_streams(photos: Made) -> None:
    source = photos.source(augment="crop")
    assert isinstance(source, Source)
    assert isinstance(source, Streaming)
    assert source.block_sizes == [6, 6, 5, 5]
    assert source.classes == ["ant", "bee", "cat"]


@pytest.mark.parametrize("augment", ["none", "light"])
def test_the_same_bits_at_the_same_step_as_from_the_shards(pixels: Made, augment: str) -> None:
    shards = ImageShards(pixels.shards / "train", train=True, augment=augment, **LOOK)
    options: dict[str, Any] = {"seed": 5, "batch_size": 12, "start": 24, "steps": 4, "rank": 1, "world": 2, "window": 2}
    ours = list(train_batches(pixels.source(augment=augment), workers=1, **options))
    theirs = list(train_batches(shards, **options))
    assert len(ours) == len(theirs) == 4
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert all(one[name].dtype == other[name].dtype for name in one)
