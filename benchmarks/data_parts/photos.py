"""JPEG files of the size of usual photos, as input of the benchmarks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

WIDE, HIGH = 500, 375  # the usual photo of ImageNet


def make_images(count: int, source: Path | None = None) -> list[bytes]:
    """Return JPEG files of 500 × 375: enlarged images from ``source``, or else synthetic ones of about 80 kB."""
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")) if source else []
    made = []
    for number in range(count):
        if files:
            with Image.open(files[number * len(files) // count]) as found:
                image = found.convert("RGB").resize((WIDE, HIGH), Image.Resampling.BICUBIC)
        else:
            image = _photo(number)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        made.append(buffer.getvalue())
    return made


def _photo(number: int) -> Image.Image:
    """Return noise with a spectrum like that of photos, where each octave is weaker than the lower one."""
    rng, total = np.random.default_rng(number), np.zeros((HIGH, WIDE, 3), np.float32)
    for octave in range(1, 10):
        small = rng.normal(size=(max(2, 3 * 2**octave // 4), 2**octave, 3)).astype(np.float32)
        grown = [
            np.asarray(Image.fromarray(small[..., c]).resize((WIDE, HIGH), Image.Resampling.BICUBIC)) for c in range(3)
        ]
        total += np.stack(grown, -1) * 0.8**octave
    return Image.fromarray(np.clip(128 + 70 * total, 0, 255).astype(np.uint8))
