"""ViM2, the vision MambaMixer (paper, section "ViM2"): a hierarchy of token and channel mixers.

Notable:
- a stem and four stages at strides 4, 8, 16, 32 (other sizes by configuration), any input size;
- groups of two token mixers (cross-scan) and one channel mixer;
- weighted averaging of earlier features within each stage instead of residual connections.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import ViM2Config
from mmtrain.models.averaging import MixerStack
from mmtrain.models.mixers import ImageChannelMixer, ImageTokenMixer
from mmtrain.models.s6 import initialise
from mmtrain.models.stochastic import DropPath, name_streams


class PatchMerging(nn.Module):
    """2× down-sampling x (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C): the four neighbours joined, normalised, projected."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.proj = nn.Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        x = x.view(b, -(-h // 2), 2, -(-w // 2), 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.proj(self.norm(x))


class ViM2(nn.Module):
    """Image classifier: x (B, in_channels, H, W) → logits (B, num_classes).

    Raises:
        ValueError: for a wrong number of channels, or an image smaller than the stem's stride.
    """

    def __init__(self, config: ViM2Config) -> None:
        super().__init__()
        self.config = config
        dims = config.dims
        self.stem = nn.Conv2d(config.in_channels, dims[0], config.patch_size, config.patch_size)
        self.stem_norm = nn.LayerNorm(dims[0])
        self.downs = nn.ModuleList(PatchMerging(a, b) for a, b in pairwise(dims))
        total = sum(n + n // 2 for n in config.token_mixers)
        rates = iter([config.drop_path * i / max(total - 1, 1) for i in range(total)])
        self.stages = nn.ModuleList(
            self._stage(dim, tokens, expand, rates)
            for dim, tokens, expand in zip(dims, config.token_mixers, config.channel_expand, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], config.num_classes)
        initialise(self)
        name_streams(self)

    def _stage(self, dim: int, tokens: int, channel_expand: int, rates: Iterator[float]) -> MixerStack:
        c = self.config
        mixers: list[nn.Module] = []
        for _ in range(tokens // 2):
            mixers += [ImageTokenMixer(dim, expand=c.expand, state=c.state) for _ in range(2)]
            mixers += [
                ImageChannelMixer(dim, expand=channel_expand, state=c.state, window=c.window, conv=c.channel_conv)
            ]
        norms: list[nn.Module] = [nn.LayerNorm(dim) for _ in mixers]
        drops: list[nn.Module] = [DropPath(next(rates)) for _ in mixers]
        return MixerStack(mixers, norms, drops, c.averaging)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.features(x)[-1].mean(dim=(1, 2))))

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of each stage, (B, H_i, W_i, dims[i])."""
        p = self.config.patch_size
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}: give images (B, {self.config.in_channels}, H, W)")
        if min(x.shape[2:]) < p:
            raise ValueError(f"x has images of {x.shape[2]}×{x.shape[3]} pixels: they must be at least {p}×{p}")
        x = F.pad(x, (0, -x.shape[3] % p, 0, -x.shape[2] % p))
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1))
        found = []
        for i, stage in enumerate(self.stages):
            x = stage(self.downs[i - 1](x) if i else x)
            found.append(x)
        return found
