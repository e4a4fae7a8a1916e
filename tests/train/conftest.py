"""A tiny run of each task, as configuration files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def vision_in(digits: Path) -> Callable[[Path], Path]:
    """Write ViM2 with everything random on: augmentation, Mixup, CutMix, drop path, EMA, accumulation."""

    def write(folder: Path) -> Path:
        path = folder / "vision.yaml"
        path.write_text(f"""
model: {{name: vim2_nano, num_classes: 10, dims: [8, 16], token_mixers: [2, 2], channel_expand: [2, 1], drop_path: 0.2}}
data: {{kind: shards, root: {digits}, test: test, image_size: 16, augment: light, mean: [0.3, 0.3, 0.3],
        std: [0.3, 0.3, 0.3]}}
task: {{kind: classification, mixup: 0.2, cutmix: 0.5}}
optim: {{lr: 3.0e-3, warmup_epochs: 0.2}}
train: {{epochs: 1.3, max_steps: 24, batch_size: 64, accumulation: 2, ema_decay: 0.9, log_every: 1}}
eval: {{every_steps: 8}}
checkpoint: {{every_steps: 3}}
tracking: {{plots: false}}
threads: 1
""")
        return path

    return write


@pytest.fixture
def vision(vision_in: Callable[[Path], Path], tmp_path: Path) -> Path:
    return vision_in(tmp_path)


@pytest.fixture
def series(waves: Path, tmp_path: Path) -> Path:
    """TSM2 with dropout, over more than one epoch."""
    path = tmp_path / "series.yaml"
    path.write_text(f"""
model: {{name: tsm2, lookback: 48, horizon: 24, dim: 8, depth: 1, dropout: 0.2, linear_path: true}}
data: {{kind: series, path: {waves}, split: ratio}}
task: {{kind: forecasting}}
optim: {{lr: 3.0e-3, weight_decay: 0.01}}
train: {{epochs: 4, batch_size: 32, log_every: 2}}
eval: {{every_epochs: 1}}
tracking: {{plots: false}}
threads: 1
""")
    return path
