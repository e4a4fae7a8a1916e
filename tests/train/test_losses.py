"""Losses against values by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mmtrain.models.tsm2 import Forecasts
from mmtrain.tasks import StepKey
from mmtrain.tasks.classification import Classification
from mmtrain.tasks.forecasting import Forecasting

KEY = StepKey(seed=0, step=3)
LOGITS = torch.tensor([2.0, 0.0, 0.0, 0.0])


class Fixed(nn.Module):
    """Gives every image the same logits."""

    def forward(self, images: Tensor) -> Tensor:
        return LOGITS.expand(len(images), -1)


def classification(**options: float) -> Classification:
    """The task of 4 classes, without data."""
    task = object.__new__(Classification)
    chosen = {"mixup": 0.0, "cutmix": 0.0, "mix_prob": 1.0, "label_smoothing": 0.2, **options}
    task.options, task.num_classes = SimpleNamespace(**chosen), 4  # type: ignore[assignment]
    task.mixup = task._mixup()
    return task


def test_label_smoothing_by_hand() -> None:
    batch = {"image": torch.zeros(2, 3, 8, 8), "label": torch.tensor([0, 0])}
    total = math.log(math.exp(2) + 3)
    right, wrong = total - 2, total
    expected = (0.8 + 0.2 / 4) * right + 3 * (0.2 / 4) * wrong
    assert classification().loss(Fixed(), batch, KEY).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_targets_are_smoothed(kind: str) -> None:
    task = classification(**{kind: 1.0})
    labels = torch.tensor([0, 1, 2, 3])
    mixed, targets = task._mix(torch.rand(4, 3, 8, 8), labels, KEY)
    assert targets.min().item() == pytest.approx(0.2 / 4)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    # the shares of the own class and of the partner's, two places on
    own, partner = targets[range(4), labels], targets[range(4), labels.roll(2)]
    torch.testing.assert_close(own + partner, torch.full((4,), 0.8 + 2 * 0.2 / 4))
    loss = task.loss(Fixed(), {"image": mixed, "label": labels}, KEY)
    torch.testing.assert_close(loss, -(targets * LOGITS.log_softmax(0)).sum(1).mean())


@pytest.mark.parametrize("masked", [False, True])
def test_the_pinball_loss_by_hand(masked: bool) -> None:
    """A forecast that is too low costs the level for each unit, one that is too high costs 1 - level."""
    task = object.__new__(Forecasting)
    task.options = SimpleNamespace(loss="mse", spread_weight=2.0)  # type: ignore[assignment]
    task.config = SimpleNamespace(model=SimpleNamespace(quantiles=[0.1, 0.7]))  # type: ignore[assignment]
    future = torch.tensor([[[1.0], [2.0]]])  # (B, horizon, M)
    quantiles = torch.tensor([[[[0.0, 3.0]], [[5.0, 1.0]]]])  # (B, horizon, M, K)
    made = Forecasts(future + 1.0, quantiles=quantiles)
    first = (0.1 * 1.0 + 0.3 * 2.0) / 2
    second = (0.9 * 3.0 + 0.7 * 1.0) / 2
    found = task._spread(made, future)["pinball"]
    torch.testing.assert_close(found, torch.tensor([[[first], [second]]]))
    batch = {"past": torch.zeros(1, 4, 1), "future": future}
    if masked:
        batch |= {"mask": torch.ones(1, 4, 1).bool(), "future_mask": torch.tensor([[[True], [False]]])}
    loss = task.loss(lambda past, **_: made, batch, KEY)  # type: ignore[arg-type]
    expected = 1.0 + 2.0 * (first if masked else (first + second) / 2)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
