"""Dropout and drop path belong to the sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmtrain.data.core.order import mix64
from mmtrain.models import create_model
from mmtrain.models.stochastic import DropPath, SampleDropout, sample_keys


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(mix64(seed, np.arange(count)).view(np.int64))


@pytest.mark.parametrize("layer", [SampleDropout(0.3), DropPath(0.3)])
def test_a_sample_gets_the_same_mask_in_any_batch(layer: SampleDropout | DropPath) -> None:
    x, k = torch.ones(12, 5, 7), keys(12)
    with sample_keys(k):
        whole = layer(x)
    parts = []
    for rows in (slice(0, 5), slice(5, 12)):
        with sample_keys(k[rows]):
            parts.append(layer(x[rows]))
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.8])
def test_the_share_and_the_mean_are_right(drop: float) -> None:
    layer = SampleDropout(drop)
    with sample_keys(keys(200)):
        y = layer(torch.ones(200, 1000))
    # 200,000 draws: the standard error of the share is at most 0.0012
    assert (y == 0).double().mean().item() == pytest.approx(drop, abs=0.006)
    assert y.double().mean().item() == pytest.approx(1, abs=0.02)
    with sample_keys(keys(20000)):
        paths = DropPath(drop)(torch.ones(20000, 2))
    assert (paths[:, 0] == 0).double().mean().item() == pytest.approx(drop, abs=0.02)
    assert paths.double().mean().item() == pytest.approx(1, abs=0.06)  # the standard error is at most 0.014


@pytest.mark.parametrize("channel_mixer", ["scan", "none"])
def test_drop_path_rises_linearly_to_the_last_layer(channel_mixer: str) -> None:
    model = create_model("vim2_nano", drop_path=0.3, channel_mixer=channel_mixer)
    rates = [layer.drop for layer in model.modules() if isinstance(layer, DropPath)]
    assert len(rates) > 2
    assert rates == pytest.approx(np.linspace(0, 0.3, len(rates)).tolist())


def test_masks_of_layers_samples_and_neighbours_are_independent() -> None:
    first, second = SampleDropout(0.5), SampleDropout(0.5)
    first.stream, second.stream = 1, 2
    x = torch.ones(64, 1024)
    with sample_keys(keys(64)):
        a, b = (first(x) > 0).double(), (second(x) > 0).double()
    # correlation of 65,536 independent pairs: deviation 0.004
    pairs = [(a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1])]
    for left, right in pairs:
        r = torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].item()
        assert abs(r) < 0.02


def test_nothing_is_dropped_in_evaluation() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(SampleDropout(0.5).eval()(x), x)
    assert torch.equal(DropPath(0.5).eval()(x), x)


def test_keys_of_another_batch_are_refused() -> None:
    with sample_keys(keys(3)), pytest.raises(ValueError, match="3 random keys for a batch of 4"):
        SampleDropout(0.5)(torch.ones(4, 2))
