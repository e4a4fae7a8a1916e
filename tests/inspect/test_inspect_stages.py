"""The table of stages: FLOPs against a count by hand, sums against the model."""

from __future__ import annotations

import time
from math import ceil

import pytest
import torch

from mmtrain.config import TSM2Config, ViM2Config
from mmtrain.config.models import preset
from mmtrain.errors import UserError
from mmtrain.inspect.stages import stage_table, total
from mmtrain.models import build_model

N = 4  # states


def linear(rows: int, fan_in: int, fan_out: int) -> int:
    return 2 * rows * fan_in * fan_out


def scan(positions: int, features: int) -> int:
    return positions * features * (9 * N + 1)


def s6(positions: int, features: int, rank: int) -> int:
    """The maps to B, C and the low rank of Δ, the map to Δ, and the scan."""
    return linear(positions, features, rank + 2 * N) + linear(positions, rank, features) + scan(positions, features)


def image_token_mixer(tokens: int, dim: int) -> int:
    width = 2 * dim
    conv = 2 * 9 * tokens * width
    return linear(tokens, dim, 2 * width) + conv + 4 * s6(tokens, width, ceil(dim / 16)) + linear(tokens, width, dim)


def image_channel_mixer(tokens: int, windows: int, window: int, dim: int, expand: int, taps: int) -> int:
    width, features = expand * dim, window * window
    positions = windows * width
    one_way = 2 * positions * features * taps + s6(positions, features, ceil(features / 21))
    return linear(tokens, dim, 2 * width) + 2 * one_way + linear(tokens, width, dim)


def sequence_mixer(positions: int, dim: int, taps: int, directions: int) -> int:
    width = 2 * dim
    one_way = 2 * positions * width * taps + s6(positions, width, ceil(dim / 16))
    return linear(positions, dim, 2 * width) + directions * one_way + linear(positions, width, dim)


def test_flops_of_vim2_by_hand() -> None:
    config = ViM2Config(
        name="tiny",
        num_classes=5,
        patch_size=4,
        dims=[8, 24],
        token_mixers=[2, 2],
        channel_expand=[2, 1],
        state=N,
        window=4,
        channel_conv=3,
    )
    rows = stage_table(config, batch=2, image_size=(20, 30))
    # 20 × 30 pixels, padded to 32: 5 × 8 tokens in 2 × 2 windows; merged: 3 × 4 tokens in one window; two images
    first, second = 2 * 5 * 8, 2 * 3 * 4
    by_hand = {
        "stem": 2 * first * 8 * 3 * 4 * 4,
        "stage 1": 2 * image_token_mixer(first, 8) + image_channel_mixer(first, 2 * 4, 4, 8, 2, 3),
        "stage 2": linear(second, 4 * 8, 24)
        + 2 * image_token_mixer(second, 24)
        + image_channel_mixer(second, 2, 4, 24, 1, 3),
        "head": linear(2, 24, 5),
    }
    assert {row.name: row.flops for row in rows} == by_hand
    assert total(rows).flops == sum(by_hand.values())
    scans = 2 * 4 * scan(first, 16) + 2 * scan(2 * 4 * 16, 16) + 2 * 4 * scan(second, 48) + 2 * scan(2 * 24, 16)
    assert total(rows).scan_flops == scans
    assert [row.output for row in rows] == [(2, 5, 8, 8), (2, 5, 8, 8), (2, 3, 4, 24), (2, 5)]
    assert [(row.token_mixers, row.channel_mixers) for row in rows] == [(0, 0), (2, 1), (2, 1), (0, 0)]


def test_flops_of_tsm2_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TSM2Config(
        name="tiny", lookback=40, horizon=12, patch_size=8, patch_stride=4, dim=8, depth=1, state=N, linear_path=True
    )
    positions = 3 * 5 * 9  # windows, variates, patches
    by_hand = {
        "embed": linear(positions, 8, 8),
        "mixer 1 (time)": sequence_mixer(positions, 8, 4, 1),
        "mixer 2 (variate)": sequence_mixer(positions, 8, 4, 2),
        "head": linear(3 * 5, 9 * 8, 12) + linear(3 * 5, 40, 12),
    }
    rows = stage_table(config, batch=3, variates=5)
    assert {row.name: row.flops for row in rows} == by_hand
    assert total(rows).scan_flops == 3 * scan(positions, 16)
    assert [row.output for row in rows] == [(3, 5, 9, 8)] * 3 + [(3, 12, 5)]
    # the count is that of the kernel, whatever backend runs the models here
    monkeypatch.setenv("MMTRAIN_SCAN", "reference")
    assert stage_table(config, batch=3, variates=5) == rows


@pytest.mark.parametrize("name", ["vim2_nano", "vim2_tiny", "vim2_base", "tsm2"])
def test_rows_add_up_to_the_model(name: str) -> None:
    begin = time.thread_time()
    rows = stage_table(preset(name))
    assert time.thread_time() - begin < 10
    with torch.device("meta"):
        model = build_model(preset(name))
    assert total(rows).parameters == sum(p.numel() for p in model.parameters())
    assert "other" not in {row.name for row in rows}


def test_auxiliary_inputs_are_counted_too() -> None:
    options = {"static_features": 3, "future_features": 2, "mask_input": True, "output": "quantiles", "lookback": 64}
    config = preset("tsm2", **options)
    rows = stage_table(config)
    model = build_model(config)
    assert total(rows).parameters == sum(p.numel() for p in model.parameters())
    embedding = sum(p.numel() for p in model.get_submodule("embed").parameters())
    assert {row.name: row.parameters for row in rows}["embed"] > embedding


def test_impossible_inputs_are_refused() -> None:
    with pytest.raises(UserError, match="at least 4×4"):
        stage_table(preset("vim2_tiny"), image_size=(3, 3))
    with pytest.raises(UserError, match="at least 1"):
        stage_table(preset("tsm2"), batch=0)
