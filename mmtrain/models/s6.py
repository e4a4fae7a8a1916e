"""The selective state space model (S6) and its scans in two directions (paper, section "Selective SSM")."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from mmtrain.ops import Direction, selective_mix

#: Steps are initialised log-uniform in this range (Mamba).
_STEP_RANGE = (1e-3, 1e-1)


def no_weight_decay(*parameters: nn.Parameter) -> None:
    """Mark parameters that the optimizer must not decay."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]


class S6(nn.Module):
    """One selective scan over sequences of ``features`` channels, with its own B, C and Δ.

    B_t = Linear_B(x_t), C_t = Linear_C(x_t), Δ_t = softplus(Linear_Δ(x_t)) of rank ``rank``;
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t, y_t = C_t h_t + D x_t. The parameters carry Mamba's names. Calling the
    module gives them as one direction of :func:`mmtrain.ops.selective_mix`, which runs all of a mixer's at once.
    ``A_log``, ``D`` and the bias of Δ stay in float32 and take no weight decay.
    """

    #: Nobody may keep or send these parameters in less than float32.
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
            return  # no values to set; the arithmetic below takes seconds there, for nothing
        self.x_proj.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = (math.log(bound) for bound in _STEP_RANGE)
        step = torch.exp(torch.rand_like(self.dt_proj.bias) * (high - low) + low).clamp(min=1e-4)
        # the inverse of softplus, so that softplus(bias) is the step
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))
        self.A_log.copy_(torch.log(torch.arange(1, self.state + 1, dtype=torch.float32)).expand_as(self.A_log))
        self.D.fill_(1.0)

    def forward(self, order: str = "rows") -> Direction:
        """What :func:`mmtrain.ops.selective_mix` takes for this scan in an order.

        Copies, which outlive this call: what gathers the parameters of a module for its forward lets go of them after.
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
        """Scan x (B, L, features) in an order of :data:`mmtrain.ops.arguments.NAMES`; returns y (B, L, features)."""
        return selective_mix(x, [self(order)], height=height)


class DirectionalScan(nn.Module):
    """S6 along a sequence in one or two directions, each with its own parameters; the outputs are averaged.

    With ``conv`` > 0 each direction first takes its own causal depthwise convolution of that many taps and SiLU
    ("forward = SiLU(Conv1d(x)), backward the same on Flip(x)"). Averaging instead of adding keeps the scale of the
    activations at initialisation, and is the sum itself for one direction.
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
        """x (B, L, features) → the same; ``gated``: (B, L, 2·features), the second half the gate before its SiLU."""
        orders = ("rows_reversed" if reverse else "rows" for reverse in self.reverse)
        directions = [ssm(order) for ssm, order in zip(self.ssm, orders, strict=True)]
        for i, conv in enumerate(self.conv):
            taps = cast(nn.Conv1d, conv)
            directions[i] = directions[i]._replace(conv=taps.weight.squeeze(1), conv_bias=taps.bias)
        return selective_mix(x, directions, gated)
