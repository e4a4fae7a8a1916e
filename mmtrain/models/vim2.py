"""ViM2, the vision MambaMixer (paper, section "ViM2"): a hierarchical model of token and channel mixers.

- A stem is followed by four stages with strides 4, 8, 16 and 32 (configurable). Images may have any size.
- A stage consists of groups of two token mixers (cross-scan) and one channel mixer.
- Weighted averaging of earlier features within a stage replaces residual connections.
- The model has the methods of timm's models: features, head reset, recomputation, groups for layer decay.
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

#: For each block variant (Fig. 1, 6, 7, 8): token scans, whether they share a convolution, number of channel scans.
BLOCKS: dict[str, tuple[str, bool, int]] = {
    "bidirectional": ("bidirectional", False, 2),
    "unidirectional": ("forward", False, 2),
    "multi_scan": ("cross", False, 4),
    "shared_conv": ("cross", True, 2),
}
#: Standard deviation of the truncated normal distribution that initialises linear layers.
_LINEAR_STD = 0.02


class PatchMerging(nn.Module):
    """Down-sample x (B, H, W, dim) to (B, ⌈H/2⌉, ⌈W/2⌉, out): concatenate 2 × 2 tokens, normalise, project."""

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
    """An image classifier that maps x (B, in_channels, H, W) to logits (B, num_classes).

    Raises:
        ValueError: in ``forward``, for a wrong number of channels or an image smaller than a patch.
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
        """Initialise one module of a ViM2."""
        reset_module(module, _LINEAR_STD)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised output of the last stage, (B, H, W, num_features)."""
        return self.norm(self.features(x)[-1])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average x over its tokens and apply the linear head, which ``pre_logits`` leaves out."""
        pooled = x.mean(dim=(1, 2))
        return pooled if pre_logits else self.head(pooled)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the output of each stage i, (B, H_i, W_i, dims[i])."""
        p = self.config.patch_size
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, {self.config.in_channels}, H, W)")
        if min(x.shape[2:]) < p:
            raise ValueError(f"x has images of {x.shape[2]}×{x.shape[3]} pixels: they must be at least {p}×{p}")
        x = F.pad(x, (0, -x.shape[3] % p, 0, -x.shape[2] % p))
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1))
        found = []
        for i, stage in enumerate(self.stages):
            x = stage(self.downs[i - 1](x) if i else x)
            found.append(x)
        return found

    # ------------------------------------------------------------------ methods that timm's tools call

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new one for ``num_classes`` classes; 0: no head, return the pooled features."""
        self.config.num_classes = num_classes
        self.head = Linear(self.num_features, num_classes) if num_classes else nn.Identity()  # type: ignore[assignment]
        if isinstance(self.head, nn.Linear):
            self.reset_module(self.head)
            self.head.to(next(self.norm.parameters()).device)

    def set_grad_checkpointing(self, enable: bool = True, every: int = 1) -> None:
        """Recompute the activations of every ``every``-th mixer in the backward pass, which saves memory."""
        for stage in self.stages:
            cast(MixerStack, stage).checkpoint_every = every if enable else 0

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay."""
        return {name for name, p in self.named_parameters() if getattr(p, "_no_weight_decay", False)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the groups of layers for ``timm.optim.param_groups_layer_decay``.

        Args:
            coarse: one group per stage, else one per mixer.
        """
        last = r"^norm"  # in the group of the last mixer; the head is a separate group
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^(?:stages|downs)\.(\d+)", None), (last, (99999,))]}
        mixer = r"^stages\.(\d+)\.(?:mixers|norms|drops|averages)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(r"^downs\.(\d+)", (99998,)), (mixer, None), (last, (99999,))]}

    def pyramid(self, out_indices: Sequence[int] | None = None) -> ViM2Features:
        """Return this model as a pyramid of feature maps for dense tasks. The model loses its head."""
        return ViM2Features(self, out_indices)

    def stage_parts(self) -> list[tuple[str, list[str], str]]:
        """Return the rows of the table of stages: (name, modules of the stage, module whose output is shown)."""
        parts = [("stem", ["stem", "stem_norm"], "stem_norm")]
        for i in range(len(self.stages)):
            parts.append((f"stage {i + 1}", [f"downs.{i - 1}"] * (i > 0) + [f"stages.{i}"], f"stages.{i}"))
        return [*parts, ("head", ["norm", "head"], "")]


class ViM2Features(nn.Module):
    """The pyramid of feature maps of a ViM2 for dense tasks.

    It maps x (B, C, H, W) to a list of maps (B, dims[i], H/stride_i, W/stride_i), each with its own layer norm.
    ``feature_info`` contains their widths and strides in timm's format.

    Args:
        backbone: its head and final norm are removed.
        out_indices: stages of the pyramid; default: all.
    """

    def __init__(self, backbone: ViM2, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        config = backbone.config
        self.out_indices = tuple(range(len(config.dims))) if out_indices is None else tuple(out_indices)
        wrong = [i for i in self.out_indices if not 0 <= i < len(config.dims)]
        if wrong:
            raise ValueError(f"out_indices contains {wrong}: the stages of this model are 0 to {len(config.dims) - 1}")
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
