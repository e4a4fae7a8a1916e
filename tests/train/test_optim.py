"""Decay groups, the learning rate and the averaged weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmtrain.config import OptimConfig
from mmtrain.models import create_model
from mmtrain.train.optim import WeightAverage, build_optimizer, learning_rate


def test_state_parameters_gains_and_averages_do_not_decay() -> None:
    model = create_model("vim2_nano")
    decaying, rest = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    exempt = {names[id(p)] for p in rest["params"]}
    assert len(exempt) + len(decaying["params"]) == len(names)
    for name in names.values():
        special = name.endswith(("A_log", ".D", "bias", "input_copy")) or "averages" in name or "norm" in name
        assert (name in exempt) == special, name


def test_the_learning_rate_warms_up_and_follows_the_cosine() -> None:
    config = OptimConfig(lr=1.0, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 110, 10) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)  # halfway between 1 and 0.1
    assert rates[-1] == pytest.approx(0.1, abs=0.001)
    assert learning_rate(OptimConfig(lr=1.0, schedule="constant"), 99, 110, 10) == 1.0


def test_averaged_weights_follow_their_formula_and_swap_back() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    held = {"weight": model.weight}
    average = WeightAverage(held, decay=0.5)
    expected = 0.0
    for step, value in enumerate((1.0, 2.0, 3.0)):
        nn.init.constant_(model.weight, value)
        average.update(held, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.applied(lambda: held):
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 3.0
    assert torch.allclose(average.shadow["weight"], torch.tensor(expected))
