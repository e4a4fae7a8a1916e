"""No module's output is changed in place by our models and tasks, in training.

FSDP2 hangs the hook that gathers the parameters for the backward pass on each unit's output. Where the output is a
view, an operation in place would lose the hook, and FSDP2 warns of that. ``mmtrain/parallel/fsdp.py`` silences the
warning for our models because of what this test holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from mmtrain.config import load_config
from mmtrain.models.stochastic import sample_keys
from mmtrain.models.tsm2 import Forecasts
from mmtrain.tasks import StepKey, build_task


def outputs_of(model: nn.Module) -> list[tuple[str, Tensor, int]]:
    """A list that the forward pass fills: each module's outputs and their versions, which a change in place raises."""
    kept: list[tuple[str, Tensor, int]] = []

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            found = pytree.tree_leaves(vars(output) if isinstance(output, Forecasts) else output)
            kept.extend((name, x, x._version) for x in found if isinstance(x, Tensor))

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(hook_of(name or "the model"))
    return kept


@pytest.mark.parametrize("kind", ["vision", "series", "quantiles"])
def test_no_output_is_changed_in_place(kind: str, vision: Path, series: Path) -> None:
    file = vision if kind == "vision" else series
    config = load_config(file, ["model.output=quantiles", "model.mask_input=true"] if kind == "quantiles" else [])
    task = build_task(config)
    model = task.build_model().train()
    kept = outputs_of(model)
    keys = np.arange(4, dtype=np.uint64)
    batch = task.train.fetch(np.arange(4), keys)
    with sample_keys(torch.from_numpy(keys.view(np.int64))):
        loss = task.loss(model, batch, StepKey(0, 0))
    loss.backward()
    assert len(kept) > 10
    assert any(output._base is not None for _, output, _ in kept)  # views, of which FSDP2 warns
    assert [name for name, output, version in kept if output._version != version] == []
