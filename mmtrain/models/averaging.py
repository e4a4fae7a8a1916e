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
    """The input of a mixer: a weighted sum of the outputs of earlier mixers, with learnable weights.

    ``weight`` contains the scalars α, β, θ, γ of the paper, one for each earlier output in order of computation. They
    are initialised to 1, so the sum initially equals the residual stream of a pre-norm network. The weight of the
    paper's second copy of the input (y⁰_Channel = y⁰_Token = x) is ``input_copy``, initialised to 0.

    Args:
        earlier: number of earlier outputs, including the input of the stage.
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
        """Return the weighted sum.

        Args:
            outputs: the input of the stage and the outputs of the earlier mixers, all of one shape.
        """
        weight = torch.cat([self.weight[:1] + self.input_copy, self.weight[1:]])
        return weighted_sum(outputs, weight)


class MixerStack(nn.Module):
    """A sequence of mixers. The input of each is the normalised weighted average of all earlier outputs.

    Args:
        mixers: modules that map (B, ...) to the same shape, *without* a residual connection.
        norms: the normalisation before each mixer.
        drops: the dropout or drop path after each mixer.
        averaging: False replaces the weighted averages by residual sums.
    """

    def __init__(
        self, mixers: list[nn.Module], norms: list[nn.Module], drops: list[nn.Module], averaging: bool
    ) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(norms)
        self.drops = nn.ModuleList(drops)
        self.averages = nn.ModuleList(WeightedAverage(i + 1) for i in range(len(mixers) + 1) if averaging)
        #: Recompute the activations of every n-th mixer in the backward pass; 0: of none.
        self.checkpoint_every = 0
        #: The ``context_fn`` of torch.utils.checkpoint, which selects results that are saved and not recomputed.
        self.checkpoint_contexts: Callable[[], Any] = noop_context_fn

    def forward(self, x: Tensor) -> Tensor:
        # The meta device, on which parameters are counted, has no autocast.
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.float()  # sums over the depth are float32, also if a layer before returned a lower precision
        outputs = [x]
        stream = x
        for i in range(len(self.mixers)):
            if self.averages:
                stream = self.averages[i](outputs)
            if self.checkpoint_every and self.training and i % self.checkpoint_every == 0:
                # The recomputation runs outside the context of the random keys, but must use the same dropout masks.
                branch = with_current_keys(self._branch)
                y = checkpoint(branch, stream, i, use_reentrant=False, context_fn=self.checkpoint_contexts)
            else:
                y = self._branch(stream, i)
            y = y.to(x.dtype)  # once, here: otherwise each later average would convert and save a copy
            if self.averages:
                outputs.append(y)
            else:
                stream = stream + y
        return self.averages[-1](outputs) if self.averages else stream

    def _branch(self, stream: Tensor, i: int) -> Tensor:
        return self.drops[i](self.mixers[i](self.norms[i](stream)))


def block_positions(model: nn.Module) -> list[tuple[nn.ModuleList, int]]:
    """Return the position of each block of ``model`` as (list, index). Blocks are mixers and down-sampling layers."""
    lists = [stack.mixers for stack in model.modules() if isinstance(stack, MixerStack)]
    downs = getattr(model, "downs", None)
    lists += [downs] if isinstance(downs, nn.ModuleList) else []
    return [(where, i) for where in lists for i in range(len(where))]


def model_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of ``model``, which are compiled and sharded one at a time."""
    return [where[i] for where, i in block_positions(model)]
