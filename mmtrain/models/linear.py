"""The linear layer of the models."""

from __future__ import annotations

from torch import Tensor, nn

from mmtrain.ops import linear


class Linear(nn.Linear):
    """``torch.nn.Linear`` by :func:`mmtrain.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
