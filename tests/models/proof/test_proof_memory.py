"""What autograd keeps grows linearly in length, width, pixels and depth, and holds no hidden states."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mmtrain.models import create_model
from mmtrain.models.mixers import SequenceMixer
from proof.measures import benchmark

memory = benchmark("model_memory")


def slopes(points: list[tuple[int, int]]) -> list[float]:
    return [(b - a) / (y - x) for (x, a), (y, b) in pairwise(points)]


@pytest.mark.parametrize("series", memory.all_series(), ids=lambda series: f"{series.name} in {series.along}")
def test_memory_grows_linearly(series: Any) -> None:
    """Three slopes between four sizes, within 10 % of each other (saved states are rounded up to blocks of 64
    positions and 16 channels); a quadratic term would double them from one interval to the next."""
    points = list(series.measure())
    found = slopes(points)
    assert min(found) > 0
    assert max(found) <= 1.1 * min(found)
    # and not merely a large constant: from the smallest to the largest in proportion, but for 30 % of it
    assert points[-1][1] / points[0][1] > 0.7 * points[-1][0] / points[0][0]


def test_hidden_states_are_not_kept() -> None:
    """A recurrence left to autograd keeps L·E·N numbers for the states alone, and several times over."""
    length, dim, state = 1024, 64, 64
    kept = memory.saved_bytes(SequenceMixer(dim, state=state), torch.randn(1, length, dim, requires_grad=True))
    assert kept < 4 * length * 2 * dim * state / 4


class Depth(nn.Module):
    """A TSM2 of ``mixers`` mixers, under bfloat16 autocast if asked for."""

    def __init__(self, mixers: int, autocast: bool, stream: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = create_model("tsm2", depth=mixers // 2, dim=16, lookback=128, dropout=0.0)
        self.autocast = autocast
        if stream is not None:
            cast(nn.Module, self.model.blocks).register_forward_pre_hook(lambda module, inputs: (inputs[0].to(stream),))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.model(x)


@pytest.mark.parametrize(
    ("autocast", "stream"), [(False, None), (True, None), (True, torch.float32)], ids=["float32", "bf16", "bf16 mixers"]
)
def test_memory_grows_linearly_in_depth(autocast: bool, stream: torch.dtype | None) -> None:
    """Every average reads all earlier outputs: it must keep the outputs themselves, not a copy of each for itself."""
    past = torch.randn(2, 128, 7)
    points = [(n, memory.saved_bytes(Depth(n, autocast, stream), past)) for n in (10, 20, 40, 80)]
    found = slopes(points)
    assert max(found) <= 1.1 * min(found)
