"""Any image, any look-back, any number of variates; samples that do not see each other; variates without an order."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmtrain.models import create_model
from proof.measures import scaled_error

# Rounding only: a batch of one is multiplied in blocks of another shape, so sums may run in another order.
BATCH = 1e-5

# Tiny configurations of the shapes of nano (three stages from stride 2) and micro (four from stride 4).
VIM2: dict[str, dict[str, Any]] = {
    "vim2_nano": {"dims": [8, 16, 24], "state": 4},
    "vim2_micro": {"dims": [8, 16, 16, 24], "token_mixers": [2, 2, 2, 2], "state": 4},
}

sides = st.integers(32, 160).filter(lambda side: side % 7 and side % 32)


@given(name=st.sampled_from(sorted(VIM2)), height=sides, width=sides)
@settings(max_examples=12, deadline=None)
def test_vim2_on_any_image(name: str, height: int, width: int) -> None:
    model: Any = create_model(name, num_classes=5, **VIM2[name]).eval()
    images = torch.randn(2, 3, height, width)
    stride = model.config.patch_size
    with torch.no_grad():
        maps, logits = model.features(images), model(images)
        alone = model(images[:1])
        # samples neither mix nor share statistics: another neighbour, a hundred times as large, changes nothing
        beside = model(torch.cat([images[:1], 100 * torch.randn(1, 3, height, width)]))
    for i, (found, dim) in enumerate(zip(maps, model.config.dims, strict=True)):
        step = stride * 2**i
        assert found.shape == (2, -(-height // step), -(-width // step), dim)
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    assert scaled_error(alone, logits[:1]) < BATCH
    assert scaled_error(beside[:1], logits[:1]) < BATCH


@given(
    lookback=st.integers(96, 1024),
    variates=st.one_of(st.integers(1, 12), st.integers(1, 300)),
    horizon=st.integers(1, 200),
)
@settings(max_examples=20, deadline=None)
def test_tsm2_on_any_series(lookback: int, variates: int, horizon: int) -> None:
    model = create_model("tsm2", lookback=lookback, horizon=horizon, dim=8, depth=1, state=4).eval()
    past = torch.randn(2, lookback, variates)
    with torch.no_grad():
        future = model(past)
        alone = model(past[:1])
        beside = model(torch.cat([past[:1], 100 * torch.randn(1, lookback, variates)]))
    assert future.shape == (2, horizon, variates)
    assert future.isfinite().all()
    assert scaled_error(alone, future[:1]) < BATCH
    assert scaled_error(beside[:1], future[:1]) < BATCH


@given(lookback=st.integers(96, 400), variates=st.integers(2, 40), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_only_the_variate_mixer_sees_the_order_of_variates(lookback: int, variates: int, seed: int) -> None:
    torch.manual_seed(seed)
    order = torch.randperm(variates)
    past = torch.randn(2, lookback, variates)
    # the mixer over the variates starts small beside the stream: a single swap of neighbours changes 1e-4 and more
    seen: dict[str, float] = {}
    for mixer in ("none", "bidirectional"):
        model = create_model("tsm2", lookback=lookback, horizon=24, dim=8, depth=1, variate_mixer=mixer).eval()
        with torch.no_grad():
            seen[mixer] = scaled_error(model(past[..., order]), model(past)[..., order])
    assert seen["none"] < BATCH
    if not torch.equal(order, torch.arange(variates)):
        assert seen["bidirectional"] > 10 * BATCH


def test_without_a_variate_mixer_a_forecast_ignores_the_other_series() -> None:
    model = create_model("tsm2", lookback=96, horizon=8, dim=8, variate_mixer="none").eval()
    past = torch.randn(2, 96, 5)
    with torch.no_grad():
        assert scaled_error(model(past[..., 1:2]), model(past)[..., 1:2]) < BATCH
