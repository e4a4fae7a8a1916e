"""The selective token and channel mixers (paper, section "The MambaMixer block").

Every mixer maps x to Linear_out(scan(SiLU(Conv(Linear(x)))) ⊗ SiLU(Linear(x))), without adding x.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.models.s6 import DirectionalScan


class SequenceMixer(nn.Module):
    """Mixes along the sequence x (B, L, dim): the time mixer (one direction: a Mamba block) and, given the variates
    as the sequence, the variate mixer (two directions) of TSM2."""

    def __init__(
        self, dim: int, *, expand: int = 2, state: int = 16, conv: int = 4, bidirectional: bool = False
    ) -> None:
        super().__init__()
        width = expand * dim
        self.in_proj = nn.Linear(dim, 2 * width, bias=False)
        self.scan = DirectionalScan(
            width, state=state, rank=math.ceil(dim / 16), bidirectional=bidirectional, conv=conv
        )
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(self.scan(u) * F.silu(gate))


class ImageTokenMixer(nn.Module):
    """Mixes the tokens of an image x (B, H, W, dim): depthwise 3×3 convolution, then the cross-scan.

    The four directions (row-major, column-major, both reversed) have separate S6 parameters; their merged output
    is normalised before the gate (paper, ViM2; Fig. 8: one convolution shared by the scans).
    """

    def __init__(self, dim: int, *, expand: int = 2, state: int = 16) -> None:
        super().__init__()
        width, rank = expand * dim, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * width, bias=False)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.rows = DirectionalScan(width, state=state, rank=rank)
        self.columns = DirectionalScan(width, state=state, rank=rank)
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        # the view keeps the memory channels-last, which is what the scans want
        u = F.silu(self.conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        rows = self.rows(u.reshape(b, h * w, -1)).view(b, h, w, -1)
        columns = self.columns(u.transpose(1, 2).reshape(b, w * h, -1)).view(b, w, h, -1).transpose(1, 2)
        return self.out_proj(self.norm((rows + columns) / 2) * F.silu(gate))


class ImageChannelMixer(nn.Module):
    """Mixes the channels of an image x (B, H, W, dim) by two scans along the (expanded) channel axis.

    Each element of that sequence carries the tokens of one ``window`` × ``window`` window as its features, partial
    windows being zero-padded: so no parameter depends on the size of the image (our reading of "CW-Linear").
    """

    def __init__(self, dim: int, *, expand: int = 2, state: int = 16, window: int = 7, conv: int = 4) -> None:
        super().__init__()
        width = expand * dim
        self.window = window
        self.in_proj = nn.Linear(dim, 2 * width, bias=False)
        features = window * window
        self.scan = DirectionalScan(features, state=state, rank=math.ceil(features / 21), conv=conv)
        self.norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        windows = self._partition(u)
        # the sequence runs along the channels: (windows, width, tokens of the window)
        y = self.scan(windows.transpose(1, 2)).transpose(1, 2)
        y = self._merge(y, h, w)
        return self.out_proj(self.norm(y) * F.silu(gate))

    def _partition(self, u: Tensor) -> Tensor:
        """(B, H, W, width) → (B·windows, window², width), zero-padded at the bottom and the right."""
        b, h, w, width = u.shape
        k = self.window
        u = F.pad(u, (0, 0, 0, -w % k, 0, -h % k))
        rows, columns = u.shape[1] // k, u.shape[2] // k
        return u.view(b, rows, k, columns, k, width).transpose(2, 3).reshape(-1, k * k, width)

    def _merge(self, y: Tensor, h: int, w: int) -> Tensor:
        """The inverse of :meth:`_partition`, without the padding."""
        k = self.window
        rows, columns = -(-h // k), -(-w // k)
        y = y.reshape(-1, rows, columns, k, k, y.shape[-1]).transpose(2, 3)
        return y.reshape(-1, rows * k, columns * k, y.shape[-1])[:, :h, :w]
