"""The selective token and channel mixers (paper, section "The MambaMixer block"), and the MLP of the ablations.

A selective mixer maps x to Linear_out(scan(SiLU(Conv(Linear(x)))) ⊗ SiLU(Linear(x))), without a residual connection.
The attribute ``mixes`` of a mixer is "tokens" or "channels", as defined in the paper.
"""

from __future__ import annotations

import math
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.models.s6 import S6, DirectionalScan
from mmtrain.ops import linear, selective_mix


class Linear(nn.Linear):
    """``torch.nn.Linear`` computed by :func:`mmtrain.ops.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class SequenceMixer(nn.Module):
    """A mixer along the positions of a sequence x (B, L, dim), or along ``axis`` of a tensor with four dimensions.

    TSM2 uses it as the time mixer (in one direction, a Mamba block) and as the variate mixer (in both directions).
    """

    axis = -2
    mixes = "tokens"

    def __init__(
        self, dim: int, *, expand: int = 2, state: int = 16, conv: int = 4, bidirectional: bool = False
    ) -> None:
        super().__init__()
        width = expand * dim
        self.in_proj = Linear(dim, 2 * width, bias=False)
        self.scan = DirectionalScan(
            width, state=state, rank=math.ceil(dim / 16), bidirectional=bidirectional, conv=conv
        )
        self.out_proj = Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.scan(self.in_proj(x).transpose(self.axis, -2), gated=True)
        return self.out_proj(mixed.transpose(self.axis, -2))


#: The scan orders of each kind of image scan, as names of :data:`mmtrain.ops.arguments.NAMES`.
IMAGE_SCANS: dict[str, tuple[str, ...]] = {
    "forward": ("rows",),
    "bidirectional": ("rows", "rows_reversed"),
    "cross": ("rows", "rows_reversed", "columns", "columns_reversed"),
}


class ImageTokenMixer(nn.Module):
    """A mixer of the tokens of an image x (B, H, W, dim).

    It applies a depthwise 3×3 convolution, one S6 per scan direction, the mean over directions, a layer norm and a
    gate.

    Args:
        dim: width of x.
        expand: width of the scans divided by dim.
        state: state size of the scans.
        scans: "cross" (row-major, column-major, and both reversed: ViM2), "bidirectional" (row-major and reversed) or
            "forward".
        shared_conv: use one convolution for all directions (paper, Fig. 8). Otherwise each direction has its own
            (Fig. 1, 6, 7).
    """

    mixes = "tokens"

    def __init__(
        self, dim: int, *, expand: int = 2, state: int = 16, scans: str = "cross", shared_conv: bool = True
    ) -> None:
        super().__init__()
        width, rank = expand * dim, math.ceil(dim / 16)
        self.directions = IMAGE_SCANS[scans]
        self.in_proj = Linear(dim, 2 * width, bias=False)
        self.conv = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, groups=width) for _ in self.directions[: 1 if shared_conv else None]
        )
        self.ssm = nn.ModuleList(S6(width, state, rank) for _ in self.directions)
        self.norm = nn.LayerNorm(width)
        self.out_proj = Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        # a view: the memory remains channels-last, which the scans read fastest
        u = u.permute(0, 3, 1, 2)
        grids = [F.silu(conv(u)).permute(0, 2, 3, 1) for conv in self.conv]
        return self.out_proj(self.norm(self._scan(grids)) * F.silu(gate))

    def _scan(self, grids: list[Tensor]) -> Tensor:
        """Return the mean over all directions.

        Args:
            grids: outputs of the convolutions (B, H, W, width): one for all directions, or one for each.
        """
        height = grids[0].shape[1]
        if len(grids) == 1:
            x = grids[0].flatten(1, 2)
            directions = [ssm(order) for ssm, order in zip(self.ssm, self.directions, strict=True)]
            return selective_mix(x, directions, height=height).view(grids[0].shape)
        total: Tensor | None = None
        for grid, ssm, order in zip(grids, self.ssm, self.directions, strict=True):
            y = cast(S6, ssm).scan(grid.flatten(1, 2), order, height)
            total = y if total is None else total + y
        assert total is not None
        return (total / len(grids)).view(grids[0].shape)


class ImageChannelMixer(nn.Module):
    """A mixer of the channels of an image x (B, H, W, dim), by scans along the channels in both directions.

    The sequence consists of the (expanded) channels. The features of a channel are its values at the tokens of one
    ``window`` × ``window`` window; incomplete windows are padded with zeros. Therefore no parameter depends on the size
    of the image. This is our interpretation of the paper's "CW-Linear".

    Args:
        dim: width of x.
        expand: number of scanned channels divided by dim.
        state: state size of the scans.
        window: side of the windows in tokens.
        conv: kernel size of the convolution along the channels.
        scans: 2, or 4 to add two scans with the tokens of a window in column-major order (paper, Fig. 7). These only
            permute the features, so the default is 2.
    """

    mixes = "channels"

    def __init__(
        self, dim: int, *, expand: int = 2, state: int = 16, window: int = 7, conv: int = 4, scans: int = 2
    ) -> None:
        super().__init__()
        width, features = expand * dim, window * window
        self.window = window
        self.in_proj = Linear(dim, 2 * width, bias=False)
        self.scans = nn.ModuleList(
            DirectionalScan(features, state=state, rank=math.ceil(features / 21), conv=conv) for _ in range(scans // 2)
        )
        self.norm = nn.LayerNorm(width)
        self.out_proj = Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[1:3]
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        windows = self._partition(u)
        y = self._along_channels(self.scans[0], windows)
        if len(self.scans) > 1:
            y = (y + self._turned(self._along_channels(self.scans[1], self._turned(windows)))) / 2
        return self.out_proj(self.norm(self._merge(y, h, w)) * F.silu(gate))

    @staticmethod
    def _along_channels(scan: nn.Module, windows: Tensor) -> Tensor:
        """Scan windows (windows, tokens, width) along the width."""
        return scan(windows.transpose(1, 2)).transpose(1, 2)

    def _turned(self, windows: Tensor) -> Tensor:
        """Reorder the tokens of each window from row-major to column-major."""
        k = self.window
        return windows.view(-1, k, k, windows.shape[-1]).transpose(1, 2).reshape(windows.shape)

    def _partition(self, u: Tensor) -> Tensor:
        """Divide (B, H, W, width) into windows (B·windows, window², width). The bottom and right are zero-padded."""
        b, h, w, width = u.shape
        k = self.window
        u = F.pad(u, (0, 0, 0, -w % k, 0, -h % k))
        rows, columns = u.shape[1] // k, u.shape[2] // k
        return u.view(b, rows, k, columns, k, width).transpose(2, 3).reshape(-1, k * k, width)

    def _merge(self, y: Tensor, h: int, w: int) -> Tensor:
        """Invert :meth:`_partition` and remove the padding."""
        k = self.window
        rows, columns = -(-h // k), -(-w // k)
        y = y.reshape(-1, rows, columns, k, k, y.shape[-1]).transpose(2, 3)
        return y.reshape(-1, rows * k, columns * k, y.shape[-1])[:, :h, :w]


class FeatureMLP(nn.Module):
    """Linear, GELU, Linear on the features of x (..., dim). It replaces the channel mixer in the ablations."""

    mixes = "channels"

    def __init__(self, dim: int, ratio: int = 2) -> None:
        super().__init__()
        self.up = Linear(dim, ratio * dim)
        self.down = Linear(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))
