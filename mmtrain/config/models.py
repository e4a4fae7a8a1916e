"""Architectures as data: one dataclass per family, and the named sizes of each."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from mmtrain.errors import UserError


def require(condition: bool, key: str, value: object, cure: str) -> None:
    """Raise the one-line error for a value that is of the right type but makes no sense."""
    if not condition:
        raise UserError(f"{key} is {value!r}: {cure}")


#: The block variants by name, with the paper's figure that draws each. ViM2 is built of the last, TSM2 of the second.
BLOCKS = {
    "bidirectional": "Fig. 1: token mixer in both directions, channel mixer in both directions",
    "unidirectional": "Fig. 6: token mixer in one direction, channel mixer in both directions",
    "multi_scan": "Fig. 7: four scans in both mixers, a convolution for each scan of the tokens",
    "shared_conv": "Fig. 8: four scans of the tokens after one shared convolution",
}
_CHANNEL_MIXERS = ("scan", "mlp", "none")


@dataclass
class ModelConfig:
    """What every architecture has: the name of its preset (``mmtrain.config.MODELS``)."""

    name: str = ""


@dataclass
class ViM2Config(ModelConfig):
    """ViM2 (paper, section "ViM2"): a stem, then stages of [token, token, channel] mixer groups.

    ``dims[i]`` is the width C of stage i; ``token_mixers[i]`` its number of token mixers, one channel
    mixer following every two. ``channel_expand[i]`` is the width of the channel mixer over C ("CW-Linear").
    ``block`` is one of :data:`BLOCKS`; ``channel_mixer``: scan, mlp (the paper's ablation) or none (VMamba-like).
    """

    num_classes: int = 1000
    in_channels: int = 3
    patch_size: int = 4
    dims: list[int] = field(default_factory=lambda: [96, 192, 384, 768])
    token_mixers: list[int] = field(default_factory=lambda: [2, 2, 6, 2])
    channel_expand: list[int] = field(default_factory=lambda: [2, 2, 2, 1])
    expand: int = 2
    state: int = 16
    window: int = 7
    channel_conv: int = 4
    block: str = "shared_conv"
    channel_mixer: str = "scan"
    averaging: bool = True
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for key in ("num_classes", "in_channels", "patch_size", "expand", "window", "channel_conv"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "it must be at least 1")
        require(1 <= self.state <= 64, "model.state", self.state, "the scan takes 1 to 64 states")
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "it must be in [0, 1)")
        for key, known in (("block", tuple(BLOCKS)), ("channel_mixer", _CHANNEL_MIXERS)):
            require(
                getattr(self, key) in known, f"model.{key}", getattr(self, key), f"choose one of {', '.join(known)}"
            )
        for key in ("token_mixers", "channel_expand"):
            value = getattr(self, key)
            require(
                len(value) == len(self.dims),
                f"model.{key}",
                value,
                f"it needs one entry for each of the {len(self.dims)} stages of model.dims",
            )
        require(min(self.dims) >= 1, "model.dims", self.dims, "widths must be positive")
        for count in self.token_mixers:
            require(count >= 2 and count % 2 == 0, "model.token_mixers", self.token_mixers, "two per channel mixer")


@dataclass
class TSM2Config(ModelConfig):
    """TSM2 (paper, section "TSM2"): patches of each variate, causal time mixer, bidirectional variate mixer.

    ``window_norm``: what is taken from each look-back window and given back to the forecast: ``none``,
    ``mean``, or ``standard`` (mean and deviation). ``linear_path`` adds a linear map from the look-back to
    the horizon beside the mixers. No weight depends on the number of variates.

    ``block``: unidirectional (the paper's TSM2) or bidirectional in time. ``time_mixer``: scan, or linear (one map
    along the patches: the ablation "Mamba + linear time"). ``variate_mixer``: bidirectional, forward, mlp or none.
    ``static_features`` and ``future_features`` are the widths C_S and C_Z of the auxiliary inputs (paper, equations
    21-24); ``future_length`` is T_Z, the steps of the known-future input (0: look-back + horizon). ``output``: point,
    or quantiles or student_t beside the point forecast. ``mask_input`` lets the model see where values are missing.
    """

    lookback: int = 512
    horizon: int = 96
    patch_size: int = 16
    patch_stride: int = 8
    dim: int = 32
    depth: int = 2
    expand: int = 2
    state: int = 16
    conv: int = 4
    dropout: float = 0.3
    block: str = "unidirectional"
    time_mixer: str = "scan"
    variate_mixer: str = "bidirectional"
    averaging: bool = True
    window_norm: str = "standard"
    linear_path: bool = False
    static_features: int = 0
    future_features: int = 0
    future_length: int = 0
    mask_input: bool = False
    output: str = "point"
    quantiles: list[float] = field(default_factory=lambda: [0.1, 0.5, 0.9])

    def __post_init__(self) -> None:
        for key in ("lookback", "horizon", "patch_size", "patch_stride", "dim", "depth", "expand", "conv"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "it must be at least 1")
        require(1 <= self.state <= 64, "model.state", self.state, "the scan takes 1 to 64 states")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "it must be in [0, 1)")
        require(
            self.lookback >= self.patch_size,
            "model.lookback",
            self.lookback,
            f"it must hold at least one patch (model.patch_size is {self.patch_size})",
        )
        for key in ("static_features", "future_features", "future_length"):
            require(getattr(self, key) >= 0, f"model.{key}", getattr(self, key), "it must be 0 or more")
        choices = {
            "window_norm": ("none", "mean", "standard"),
            "block": ("unidirectional", "bidirectional"),
            "time_mixer": ("scan", "linear"),
            "variate_mixer": ("bidirectional", "forward", "mlp", "none"),
            "output": ("point", "quantiles", "student_t"),
        }
        for key, known in choices.items():
            require(
                getattr(self, key) in known, f"model.{key}", getattr(self, key), f"choose one of {', '.join(known)}"
            )
        rising = all(0 < q < 1 for q in self.quantiles) and sorted(set(self.quantiles)) == list(self.quantiles)
        require(rising and len(self.quantiles) > 0, "model.quantiles", self.quantiles, "give rising numbers in (0, 1)")


# The table of the paper; nano and micro are ours for small images and machines, large and huge for the cluster.
_VIM2_SIZES: dict[str, dict[str, Any]] = {
    "vim2_nano": {"dims": [32, 64, 128], "token_mixers": [2, 2, 2], "channel_expand": [2, 2, 1], "patch_size": 2}
    | {"window": 4},
    "vim2_micro": {"dims": [48, 96, 192, 384], "token_mixers": [2, 2, 4, 2]},
    "vim2_tiny": {"dims": [96, 192, 384, 768], "token_mixers": [2, 2, 6, 2], "drop_path": 0.2},
    "vim2_small": {"dims": [96, 192, 384, 768], "token_mixers": [2, 2, 18, 2], "drop_path": 0.3},
    "vim2_base": {"dims": [128, 256, 512, 1024], "token_mixers": [2, 2, 18, 2], "drop_path": 0.5},
    "vim2_large": {"dims": [192, 384, 768, 1536], "token_mixers": [2, 2, 22, 2], "drop_path": 0.5},
    "vim2_huge": {"dims": [336, 672, 1344, 2688], "token_mixers": [2, 2, 24, 2], "drop_path": 0.6},
}

#: Every model name, with its family's dataclass and what the size changes in it.
MODELS: dict[str, tuple[type[ModelConfig], dict[str, Any]]] = {
    **{name: (ViM2Config, size) for name, size in _VIM2_SIZES.items()},
    "tsm2": (TSM2Config, {}),
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a named model.

    Raises:
        UserError: for an unknown name or argument, with the nearest one.
    """
    from mmtrain.errors import nearest

    if name not in MODELS:
        raise UserError(f"unknown model '{name}'{nearest(name, MODELS)} (models: {', '.join(MODELS)})")
    cls, size = MODELS[name]
    known = [f.name for f in fields(cls)]
    for key in overrides:
        if key not in known:
            raise UserError(f"model '{name}' has no argument '{key}'{nearest(key, known)}")
    return cls(**{"name": name, **size, **overrides})
