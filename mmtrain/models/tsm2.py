"""TSM2, the time-series MambaMixer (paper, section "TSM2").

Notable:
- each variate is cut into patches on its own and embedded with shared weights;
- a causal time mixer over the patches and a bidirectional mixer over the variates, in turn;
- weighted averaging of earlier features instead of residual connections;
- no weight depends on the number of variates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import TSM2Config
from mmtrain.models.averaging import MixerStack
from mmtrain.models.mixers import SequenceMixer
from mmtrain.models.stochastic import SampleDropout, name_streams


class TimeMixer(SequenceMixer):
    """The causal mixer along the patches of x (B, M, P, dim), each variate on its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view(x.shape)


class VariateMixer(SequenceMixer):
    """The bidirectional mixer along the variates of x (B, M, P, dim), each patch position on its own."""

    def forward(self, x: Tensor) -> Tensor:
        b, m, p, d = x.shape
        y = super().forward(x.transpose(1, 2).reshape(b * p, m, d))
        return y.view(b, p, m, d).transpose(1, 2)


class TimeFeatureNorm(nn.Module):
    """2-D normalisation: each variate of x (B, M, P, dim) over time and features at once, with a gain a feature."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-2:]) * self.weight + self.bias


class TSM2(nn.Module):
    """Forecaster: past (B, lookback, M) → future (B, horizon, M), in the units of its input.

    Raises:
        ValueError: for a past of another length than the look-back that the model was made for.
    """

    def __init__(self, config: TSM2Config) -> None:
        super().__init__()
        self.config = config
        c = config
        patches = (c.lookback - c.patch_size) // c.patch_stride + 1
        self.embed = nn.Linear(c.patch_size, c.dim)
        mixers: list[nn.Module] = []
        for _ in range(c.depth):
            mixers.append(TimeMixer(c.dim, expand=c.expand, state=c.state, conv=c.conv))
            if c.variate_mixer:
                mixers.append(VariateMixer(c.dim, expand=c.expand, state=c.state, conv=c.conv, bidirectional=True))
        norms: list[nn.Module] = [TimeFeatureNorm(c.dim) for _ in mixers]
        drops: list[nn.Module] = [SampleDropout(c.dropout) for _ in mixers]
        self.blocks = MixerStack(mixers, norms, drops, c.averaging)
        self.norm = TimeFeatureNorm(c.dim)
        self.head_drop = SampleDropout(c.dropout)
        self.head = nn.Linear(patches * c.dim, c.horizon)
        self.linear = nn.Linear(c.lookback, c.horizon) if c.linear_path else None
        if self.linear is not None:  # start as the mean of the look-back, which the window norm takes away
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        name_streams(self)

    def forward(self, past: Tensor) -> Tensor:
        c = self.config
        if past.ndim != 3 or past.shape[1] != c.lookback:
            raise ValueError(f"past has shape {tuple(past.shape)}: give windows (B, {c.lookback}, variates)")
        x = past.transpose(1, 2)
        x, mean, std = self._window_norm(x)
        tokens = self.embed(x.unfold(-1, c.patch_size, c.patch_stride))
        y = self.norm(self.blocks(tokens)).flatten(2)
        future = self.head(self.head_drop(y))
        if self.linear is not None:
            future = future + self.linear(x)
        return (future * std + mean).transpose(1, 2)

    def _window_norm(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, M, L), and what the forecast gets back: mean and deviation (B, M, 1) of each window and variate."""
        zero, one = x.new_zeros(()), x.new_ones(())
        if self.config.window_norm == "none":
            return x, zero, one
        mean = x.mean(-1, keepdim=True)
        if self.config.window_norm == "mean":
            return x - mean, mean, one
        std = torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
        return (x - mean) / std, mean, std
