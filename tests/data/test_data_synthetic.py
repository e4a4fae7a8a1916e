"""Synthetic images: a pure function of the index, and learnable."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmtrain.data.core.order import mix64
from mmtrain.data.core.source import Source
from mmtrain.data.images.synthetic import SyntheticImages
from mmtrain.errors import UserError


def test_a_pure_function_of_seed_and_index() -> None:
    source = SyntheticImages(5, 16, 100, seed=1)
    assert isinstance(source, Source)
    indices = np.array([7, 3, 7, 99])
    batch = source.fetch(indices, None)
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["label"].tolist() == [2, 3, 2, 4]
    assert torch.equal(batch["image"][0], batch["image"][2])
    other = SyntheticImages(5, 16, 100, seed=1).fetch(indices[1:2], mix64(indices[1:2]))
    assert torch.equal(other["image"][0], batch["image"][1])
    assert not torch.equal(SyntheticImages(5, 16, 100, seed=2).fetch(indices, None)["image"], batch["image"])
    later = SyntheticImages(5, 16, 93, seed=1, first=7).fetch(np.array([0]), None)
    assert torch.equal(later["image"][0], batch["image"][0])


def test_class_means_of_one_part_classify_another() -> None:
    source = SyntheticImages(8, 12, 800, seed=3, channels=1)
    batch = source.fetch(np.arange(800), None)
    image, label = batch["image"].flatten(1), batch["label"]
    means = torch.stack([image[:400][label[:400] == number].mean(0) for number in range(8)])
    found = torch.cdist(image[400:], means).argmin(1)
    assert (found == label[400:]).float().mean() > 0.95
    assert float(source.noise.std()) == pytest.approx(1, abs=0.02)
    assert float(np.sqrt((source.patterns**2).mean())) == pytest.approx(1, abs=0.1)


def test_bad_sizes() -> None:
    with pytest.raises(UserError, match="at least 1"):
        SyntheticImages(0, 8, 10, seed=0)
