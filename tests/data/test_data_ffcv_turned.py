"""Photos that a camera marked as turned (EXIF) lie upright in FFCV's files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from beton_cases import LOOK, make, picture
from PIL import Image

from mmtrain.data.images.shards import ImageShards


@pytest.mark.slow
def test_turned_photos_are_those_of_the_shards(ffcv: None, tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(picture(0, (16, 16))))
    files = []
    for turn in range(1, 9):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = turn
        image.save(buffer, "JPEG", quality=95, exif=exif)
        files.append(buffer.getvalue())
    made = make(tmp_path, {"train": files})
    near = ImageShards(made.shards / "train", train=False, **LOOK).fetch(np.arange(8), None)["image"]
    found = made.source(train=False).fetch(np.arange(8), None)["image"]
    assert len({one.numpy().tobytes() for one in near}) == 8
    assert float((found - near).abs().max()) < 0.4  # 20 grey levels: how the decoders differ
