"""data.faults with FFCV's files: what it does not do is said."""

from __future__ import annotations

import pytest
from beton_cases import Made

from mmtrain.config.data import FFCVDataConfig
from mmtrain.data.open_images import open_images


@pytest.mark.parametrize("faults", ["stop", "skip"])
def test_that_images_are_not_left_out_is_said_once(photos: Made, caplog: pytest.LogCaptureFixture, faults: str) -> None:
    made = FFCVDataConfig(root=str(photos.beton), image_size=16, augment="crop", faults=faults, val="train")
    open_images(made, num_classes=3, seed=0)
    said = [text for text in caplog.messages if "leaving images out needs data.kind=shards" in text]
    assert len(said) == (faults == "skip")
    assert all("train.beton" in text for text in said)
