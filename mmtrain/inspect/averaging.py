"""The learned weights α, β, θ, γ of the weighted averaging, as matrices."""

from __future__ import annotations

import numpy as np
from torch import nn

from mmtrain.models.averaging import MixerStack
from mmtrain.models.kinds import mixer_labels
from mmtrain.plotting.averaging import AveragingMatrix


def averaging_matrices(model: nn.Module) -> list[AveragingMatrix]:
    """The weights of every :class:`MixerStack` in ``model``; none for a model that was made without averaging."""
    found = []
    stacks = [(name, m) for name, m in model.named_modules() if isinstance(m, MixerStack) and len(m.averages)]
    for number, (name, stack) in enumerate(stacks, 1):
        labels = mixer_labels(stack.mixers)
        size = len(stack.averages)
        weights = np.full((size, size), np.nan, np.float32)
        for i, average in enumerate(stack.averages):
            row = average.get_parameter("weight").detach().float().cpu().numpy().copy()
            row[0] += float(average.get_parameter("input_copy").detach())
            weights[i, : len(row)] = row
        title = f"stage {number}" if name.startswith("stages.") else name
        found.append(AveragingMatrix(title, [*labels, "out"], ["x", *labels], weights))
    return found
