"""Weighted averaging of earlier features (paper, "Weighted Averaging of Earlier Features"; after DenseFormer)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from mmtrain.models.s6 import no_weight_decay
from mmtrain.models.stochastic import with_current_keys
from mmtrain.ops import weighted_sum


class WeightedAverage(nn.Module):
    """A learnable weighted sum of the earlier token and channel outputs: the input of one mixer.

    The four families of scalars α, β, θ, γ of the paper are the entries of ``weight``: one for each earlier output, in
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
        return weighted_sum(outputs, weight)


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
        #: Recompute every n-th mixer in the backward pass instead of keeping its activations; 0 for none.
        self.checkpoint_every = 0
        #: What torch.utils.checkpoint takes as ``context_fn``: which results are kept nevertheless.
        self.checkpoint_contexts: Callable[[], Any] = noop_context_fn

    def forward(self, x: Tensor) -> Tensor:
        # torch knows no autocast of the meta device, where models are counted
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # what is summed over the depth stays float32, whatever made the first of it
        outputs = [x]
        stream = x
        for i in range(len(self.mixers)):
            if self.averages:
                stream = self.averages[i](outputs)
            if self.checkpoint_every and self.training and i % self.checkpoint_every == 0:
                # the masks of dropout must come out the same in the backward pass, where the keys are out of context
                branch = with_current_keys(self._branch)
                y = checkpoint(branch, stream, i, use_reentrant=False, context_fn=self.checkpoint_contexts)
            else:
                y = self._branch(stream, i)
            y = y.to(x.dtype)  # once, here: every later average would keep a copy of its own
            if self.averages:
                outputs.append(y)
            else:
                stream = stream + y
        return self.averages[-1](outputs) if self.averages else stream

    def _branch(self, stream: Tensor, i: int) -> Tensor:
        return self.drops[i](self.mixers[i](self.norms[i](stream)))


def block_places(model: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    """Where the larger units of ``model`` are, every mixer and what stands between stages: a list and a place each."""
    lists = [stack.mixers for stack in model.modules() if isinstance(stack, MixerStack)]
    downs = getattr(model, "downs", None)
    lists += [downs] if isinstance(downs, nn.ModuleList) else []
    return [(where, i) for where in lists for i in range(len(where))]


def model_blocks(model: nn.Module) -> list[nn.Module]:
    """The units of ``model`` that are compiled, or gathered, one at a time."""
    return [where[i] for where, i in block_places(model)]
