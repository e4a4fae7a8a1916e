"""The 1,797 hand-written digits of scikit-learn (UCI "Optical Recognition of Handwritten Digits", test part)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from mmtrain.data.prepare.encode import Item
from mmtrain.data.prepare.images import stratify
from mmtrain.data.prepare.writer import Prepared, existing, write_dataset
from mmtrain.errors import UserError

SOURCE = "scikit-learn load_digits (UCI Optical Recognition of Handwritten Digits, CC BY 4.0)"
SHARD_SIZE = 150


def prepare_digits(out: str | Path, image_size: int = 32, *, force: bool = False) -> Prepared:
    """Write the 8 × 8 scans, enlarged with Lanczos' filter, as grey PNGs in shards; split 70/10/20 % within each class.

    Needs scikit-learn (``pip install 'mmtrain[demo]'``), no network.
    """
    from PIL import Image

    if image_size < 8:
        raise UserError(f"--image-size {image_size}: 8 pixels or more")
    out = Path(out).expanduser()
    settings = {"image_size": image_size}
    if (done := existing(out, SOURCE, settings, force=force)) is not None:
        return done
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"the digits come with scikit-learn: pip install 'mmtrain[demo]' ({error})") from error
    digits = load_digits()
    items = []
    for scan, label in zip(digits.images, digits.target, strict=True):  # scan: (8, 8) float, 0..16
        image = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
        buffer = io.BytesIO()
        image.resize((image_size, image_size), Image.Resampling.LANCZOS).save(buffer, format="PNG")
        items.append(Item(int(label), content=buffer.getvalue()))
    splits = stratify(Path(), items, val_fraction=0.1, test_fraction=0.2)
    classes = [str(name) for name in digits.target_names]
    return write_dataset(out, splits, classes, SOURCE, settings, shard_size=SHARD_SIZE, force=force)
