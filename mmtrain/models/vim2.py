"""ViM2, the vision MambaMixer (paper, section "ViM2"): a hierarchy of token and channel mixers.

- A stem and four stages at strides 4, 8, 16, 32 (other sizes by configuration) take images of any size.
- A stage has groups of two token mixers (cross-scan) and one channel mixer.
- Weighted averaging of earlier features within a stage takes the place of residual connections.
- The model has the methods of timm's models: features, head reset, checkpointing, groups for layer decay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config import MODELS, ViM2Config
from mmtrain.models.averaging import MixerStack
from mmtrain.models.initialise import initialise, reset_module
from mmtrain.models.mixers import FeatureMLP, ImageChannelMixer, ImageTokenMixer, Linear
from mmtrain.models.stochastic import DropPath, name_streams

#: The scans of each block variant (Fig. 1, 6, 7, 8): of the tokens, whether these share a convolution, of the channels.
BLOCKS: dict[str, tuple[str, bool, int]] = {
    "bidirectional": ("bidirectional", False, 2),
    "unidirectional": ("forward", False, 2),
    "multi_scan": ("cross", False, 4),
    "shared_conv": ("cross", True, 2),
}
#: The deviation of the truncated normal that linear maps start from.
_LINEAR_STD = 0.02


class PatchMerging(nn.Module):
    """2× down-sampling x (B, H, W, C) → (B, ⌈H/2⌉, ⌈W/2⌉, 2C): the four neighbours joined, normalised, projected."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.proj = Linear(4 * dim, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2))
        x = x.view(b, -(-h // 2), 2, -(-w // 2), 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.proj(self.norm(x))


@MODELS.implements(ViM2Config)
class ViM2(nn.Module):
    """Image classifier: x (B, in_channels, H, W) → logits (B, num_classes).

    Raises:
        ValueError: for a wrong number of channels, or an image smaller than the stem's stride.
    """

    def __init__(self, config: ViM2Config) -> None:
        super().__init__()
        self.config = config
        dims = config.dims
        self.num_features = dims[-1]
        self.stem = nn.Conv2d(config.in_channels, dims[0], config.patch_size, config.patch_size)
        self.stem_norm = nn.LayerNorm(dims[0])
        self.downs = nn.ModuleList(PatchMerging(a, b) for a, b in pairwise(dims))
        group = 2 if config.channel_mixer == "none" else 3
        total = sum(tokens // 2 * group for tokens in config.token_mixers)
        rates = iter([config.drop_path * i / max(total - 1, 1) for i in range(total)])
        self.stages = nn.ModuleList(
            self._stage(dim, tokens, expand, rates)
            for dim, tokens, expand in zip(dims, config.token_mixers, config.channel_expand, strict=True)
        )
        self.norm = nn.LayerNorm(dims[-1])
        self.head = Linear(dims[-1], config.num_classes)
        initialise(self, _LINEAR_STD)
        name_streams(self)

    def _stage(self, dim: int, tokens: int, channel_expand: int, rates: Iterator[float]) -> MixerStack:
        c = self.config
        scans, shared_conv, channel_scans = BLOCKS[c.block]
        mixers: list[nn.Module] = []
        for _ in range(tokens // 2):
            for _ in range(2):
                mixers.append(
                    ImageTokenMixer(dim, expand=c.expand, state=c.state, scans=scans, shared_conv=shared_conv)
                )
            if c.channel_mixer == "scan":
                options: dict[str, Any] = {"window": c.window, "conv": c.channel_conv, "scans": channel_scans}
                mixers.append(ImageChannelMixer(dim, expand=channel_expand, state=c.state, **options))
            elif c.channel_mixer == "mlp":
                mixers.append(FeatureMLP(dim))
        norms: list[nn.Module] = [nn.LayerNorm(dim) for _ in mixers]
        drops: list[nn.Module] = [DropPath(next(rates)) for _ in mixers]
        return MixerStack(mixers, norms, drops, c.averaging)

    @staticmethod
    def reset_module(module: nn.Module) -> None:
        """Initial values for one module of a ViM2."""
        reset_module(module, _LINEAR_STD)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The normalised output of the last stage, (B, H, W, num_features)."""
        return self.norm(self.features(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average pool, then the linear head unless ``pre_logits``."""
        pooled = x.mean(dim=(1, 2))
        return pooled if pre_logits else self.head(pooled)

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

    # ------------------------------------------------------------------ what timm's tools ask for

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for ``num_classes`` classes; 0 leaves the pooled features."""
        self.config.num_classes = num_classes
        self.head = Linear(self.num_features, num_classes) if num_classes else nn.Identity()  # type: ignore[assignment]
        if isinstance(self.head, nn.Linear):
            self.reset_module(self.head)
            self.head.to(next(self.norm.parameters()).device)

    def set_grad_checkpointing(self, enable: bool = True, every: int = 1) -> None:
        """Recompute every ``every``-th mixer's activations in the backward pass: less memory for more time."""
        for stage in self.stages:
            cast(MixerStack, stage).checkpoint_every = every if enable else 0

    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that must not decay."""
        return {name for name, p in self.named_parameters() if getattr(p, "_no_weight_decay", False)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers in order, for ``timm.optim.param_groups_layer_decay``: a group a stage if ``coarse``, else a mixer."""
        last = r"^norm"  # with the last mixer; the head is a group of its own
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^(?:stages|downs)\.(\d+)", None), (last, (99999,))]}
        mixer = r"^stages\.(\d+)\.(?:mixers|norms|drops|averages)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(r"^downs\.(\d+)", (99998,)), (mixer, None), (last, (99999,))]}

    def pyramid(self, out_indices: Sequence[int] | None = None) -> ViM2Features:
        """This model as the pyramid of feature maps for dense tasks."""
        return ViM2Features(self, out_indices)

    def stage_parts(self) -> list[tuple[str, list[str], str]]:
        """Name, modules and module of the output of each row of the table of stages."""
        parts = [("stem", ["stem", "stem_norm"], "stem_norm")]
        for i in range(len(self.stages)):
            parts.append((f"stage {i + 1}", [f"downs.{i - 1}"] * (i > 0) + [f"stages.{i}"], f"stages.{i}"))
        return [*parts, ("head", ["norm", "head"], "")]


class ViM2Features(nn.Module):
    """The pyramid of a ViM2 for dense tasks: x (B, C, H, W) → a map (B, dims[i], H/stride_i, W/stride_i) for each stage
    of ``out_indices`` (default: all).

    Each map is normalised by a layer norm of its own. ``feature_info`` tells widths and strides as timm's does.
    """

    def __init__(self, backbone: ViM2, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        config = backbone.config
        self.out_indices = tuple(range(len(config.dims))) if out_indices is None else tuple(out_indices)
        wrong = [i for i in self.out_indices if not 0 <= i < len(config.dims)]
        if wrong:
            raise ValueError(f"out_indices has {wrong}: this model has the stages 0 to {len(config.dims) - 1}")
        backbone.reset_classifier(0)
        backbone.norm = nn.Identity()  # type: ignore[assignment]
        self.backbone = backbone
        self.norms = nn.ModuleList(nn.LayerNorm(config.dims[i]) for i in self.out_indices)
        self.feature_info = [
            {"num_chs": config.dims[i], "reduction": config.patch_size * 2**i, "module": f"stages.{i}"}
            for i in self.out_indices
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone.features(x)
        return [norm(maps[i]).permute(0, 3, 1, 2) for i, norm in zip(self.out_indices, self.norms, strict=True)]
