"""Every registered model, at tiny size, learns one batch by heart: nothing in its path blocks the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmtrain.config import MODELS
from mmtrain.models import create_model, list_models

# by family: what makes a preset tiny, and one batch of its input
TINY: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "ViM2Config": (
        {"num_classes": 4, "dims": [16, 24], "token_mixers": [2, 2], "channel_expand": [2, 1], "patch_size": 2}
        | {"window": 4, "state": 4, "drop_path": 0.0},
        (8, 3, 12, 12),
    ),
    "TSM2Config": ({"lookback": 48, "horizon": 8, "dim": 16, "depth": 1, "state": 4, "dropout": 0.0}, (4, 48, 3)),
}


def distinct() -> list[str]:
    """The names whose tiny models differ: sizes of one family shrink to the same one."""
    found: dict[str, str] = {}
    for name in list_models():
        family = MODELS[name]
        assert family.__name__ in TINY, f"give the family of {name} a tiny size above"
        config = MODELS.make(name, **TINY[family.__name__][0])
        found.setdefault(f"{family.__name__} {config.model_dump(exclude={'name'})}", name)
    return list(found.values())


def options_of(name: str) -> list[dict[str, Any]]:
    """The preset itself, and every architecture switch of its family, one at a time."""
    if MODELS[name].__name__ == "ViM2Config":
        switches: dict[str, tuple[object, ...]] = {
            "block": ("bidirectional", "unidirectional", "multi_scan"),
            "channel_mixer": ("mlp", "none"),
        }
    else:
        switches = {"block": ("bidirectional",), "time_mixer": ("linear",), "variate_mixer": ("mlp", "forward", "none")}
    switches["averaging"] = (False,)
    return [{}, *({key: value} for key, values in switches.items() for value in values)]


CASES = [(name, options) for name in distinct() for options in options_of(name)]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {o or ''}" for n, o in CASES])
def test_one_batch_is_learnt_by_heart(name: str, options: dict[str, Any]) -> None:
    """Down to a hundredth of the loss of a guess (log 4 for four classes, 1 for forecasts of deviation 1)."""
    family = MODELS[name].__name__
    tiny, shape = TINY[family]
    model = create_model(name, **{**tiny, **options})
    x = torch.randn(shape)
    if family == "ViM2Config":
        target = torch.arange(shape[0]) % 4

        def loss_of(y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(y, target)
    else:
        future = torch.randn(model(x).shape)

        def loss_of(y: torch.Tensor) -> torch.Tensor:
            return F.mse_loss(y, future)

    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    first = loss_of(model(x)).item()
    for _ in range(300):
        loss = loss_of(model(x))
        if loss.item() < 0.01 * first:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pytest.fail(f"after 300 steps the loss is {loss.item():.3g}, at first it was {first:.3g}")
