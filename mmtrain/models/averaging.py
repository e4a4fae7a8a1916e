"""Weighted averaging of earlier features (paper, "Weighted Averaging of Earlier Features"; after DenseFormer)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtrain.models.s6 import no_weight_decay


class WeightedAverage(nn.Module):
    """A learnable weighted sum of the earlier token and channel outputs: the input of one mixer.

    The four scalars families α, β, θ, γ of the paper are the entries of ``weight``: one for each earlier output, in
    the order in which they were made. They start at 1, so the sum starts as the residual stream of a pre-norm
    network. The paper's second copy of the input (y⁰_Channel = y⁰_Token = x) has a weight of its own, starting at 0.
    """

    def __init__(self, earlier: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(earlier))
        self.input_copy = nn.Parameter(torch.zeros(1))
        no_weight_decay(self.weight, self.input_copy)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0)
        self.input_copy.zero_()

    def forward(self, outputs: list[Tensor]) -> Tensor:
        """``outputs``: the stage's input, then each earlier mixer's output, all of one shape."""
        weight = torch.cat([self.weight[:1] + self.input_copy, self.weight[1:]])
        total = outputs[0] * weight[0].to(outputs[0].dtype)
        for w, y in zip(weight[1:], outputs[1:], strict=True):
            total = torch.addcmul(total, y, w.to(y.dtype))
        return total


class MixerStack(nn.Module):
    """Mixers in sequence, each fed with the normalised weighted average of all earlier outputs.

    ``mixers[i]`` maps (B, ...) to the same shape *without* adding its input. With ``averaging`` off, the inputs are
    the plain residual sums.
    """

    def __init__(
        self, mixers: list[nn.Module], norms: list[nn.Module], drops: list[nn.Module], averaging: bool
    ) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(norms)
        self.drops = nn.ModuleList(drops)
        self.averages = nn.ModuleList(WeightedAverage(i + 1) for i in range(len(mixers) + 1) if averaging)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        stream = x
        for i, (mixer, norm, drop) in enumerate(zip(self.mixers, self.norms, self.drops, strict=True)):
            if self.averages:
                stream = self.averages[i](outputs)
            y = drop(mixer(norm(stream)))
            if self.averages:
                outputs.append(y)
            else:
                stream = stream + y
        return self.averages[-1](outputs) if self.averages else stream
