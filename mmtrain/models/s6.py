"""The selective state space model S6 and its scans in one or two directions (paper, section "Selective SSM")."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from mmtrain.ops import Direction, selective_mix

#: The step sizes Δ are initialised log-uniformly in this range, as in Mamba.
_STEP_RANGE = (1e-3, 1e-1)


def no_weight_decay(*parameters: nn.Parameter) -> None:
    """Exclude parameters from weight decay."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


class S6(nn.Module):
    """The parameters of one selective scan over sequences with ``features`` channels.

        B_t = Linear_B(x_t),  C_t = Linear_C(x_t),  Δ_t = softplus(Linear_Δ(x_t)), of rank ``rank``
        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t
        y_t = C_t h_t + D x_t

    The parameters have the names of Mamba's. ``forward`` returns them as a direction for
    :func:`mmtrain.ops.selective_mix`, which runs all directions of a mixer at once. ``A_log``, ``D`` and the bias of Δ
    are always float32 and have no weight decay.

    Args:
        features: number of channels.
        state: state size N.
        rank: rank of Δ; default: features / 16, rounded up.
    """

    #: These parameters must not be stored or communicated in lower precision than float32.
    keep_float32 = True

    def __init__(self, features: int, state: int = 16, rank: int | None = None) -> None:
        super().__init__()
        self.state = state
        self.rank = rank if rank is not None else math.ceil(features / 16)
        self.x_proj = nn.Linear(features, self.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.rank, features)
        self.A_log = nn.Parameter(torch.empty(features, state))
        self.D = nn.Parameter(torch.empty(features))
        no_weight_decay(self.A_log, self.D, self.dt_proj.bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.A_log.is_meta:
            return  # there are no values, and the computation below is slow on the meta device
        self.x_proj.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = (math.log(bound) for bound in _STEP_RANGE)
        step = torch.exp(torch.rand_like(self.dt_proj.bias) * (high - low) + low).clamp(min=1e-4)
        # the inverse of softplus, so that softplus(bias) = step
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.A_log.copy_(torch.log(torch.arange(1, self.state + 1, dtype=torch.float32)).expand_as(self.A_log))
        self.D.fill_(1.0)

    def forward(self, order: str = "rows") -> Direction:
        """Return the parameters as a direction of :func:`mmtrain.ops.selective_mix` with the given scan order.

        The tensors are copies, because FSDP frees gathered parameters after the forward call of a module.
        """
        return Direction(
            self.x_proj.weight.clone(),
            self.dt_proj.weight.clone(),
            self.dt_proj.bias.float().clone(),
            -torch.exp(self.A_log.float()),
            self.D.float().clone(),
            order,
        )

    def scan(self, x: Tensor, order: str = "rows", height: int = 1) -> Tensor:
        """Scan x (B, L, features) and return y (B, L, features).

        Args:
            order: one of :data:`mmtrain.ops.arguments.NAMES`.
            height: number of rows of the grid; 1 for a sequence.
        """
        return selective_mix(x, [self(order)], height=height)


class DirectionalScan(nn.Module):
    """The mean of S6 scans along a sequence in one or two directions, each with its own parameters.

    The mean, in contrast to the sum, preserves the scale of the activations at initialisation.

    Args:
        features: number of channels.
        state: state size N.
        rank: rank of Δ.
        bidirectional: scan in both directions, else only forward.
        conv: kernel size of a causal depthwise convolution with SiLU before each scan; 0: none. The paper has
            SiLU(Conv1d(x)) for the forward direction and the same on Flip(x) for the backward direction.
    """

    def __init__(
        self, features: int, *, state: int = 16, rank: int | None = None, bidirectional: bool = True, conv: int = 0
    ) -> None:
        super().__init__()
        self.reverse = (False, True) if bidirectional else (False,)
        self.ssm = nn.ModuleList(S6(features, state, rank) for _ in self.reverse)
        self.conv = nn.ModuleList(
            nn.Conv1d(features, features, conv, groups=features) for _ in self.reverse if conv > 0
        )

    def forward(self, x: Tensor, gated: bool = False) -> Tensor:
        """Return the mean over the directions, (B, L, features).

        Args:
            x: (B, L, features), or (B, L, 2·features) if ``gated``.
            gated: the second half of x is a gate; multiply the result by its SiLU.
        """
        orders = ("rows_reversed" if reverse else "rows" for reverse in self.reverse)
        directions = [ssm(order) for ssm, order in zip(self.ssm, orders, strict=True)]
        for i, conv in enumerate(self.conv):
            taps = cast(nn.Conv1d, conv)
            directions[i] = directions[i]._replace(conv=taps.weight.squeeze(1), conv_bias=taps.bias)
        return selective_mix(x, directions, gated)
