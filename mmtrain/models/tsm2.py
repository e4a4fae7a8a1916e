"""TSM2, the time-series MambaMixer (paper, section "TSM2").

- Each variate is cut into patches on its own and embedded with shared weights.
- A causal time mixer over the patches and a bidirectional mixer over the variates take turns.
- Weighted averaging of earlier features takes the place of residual connections.
- Static and known-future inputs (equations 21-24) stand beside the series, missing values are masked, and quantiles or
  a Student-t come with the point forecast.
- No weight depends on the number of variates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import StudentT

from mmtrain.config import MODELS, TSM2Config
from mmtrain.models.averaging import MixerStack
from mmtrain.models.mixers import FeatureMLP, Linear, SequenceMixer
from mmtrain.models.stochastic import SampleDropout, name_streams


class TimeMixer(SequenceMixer):
    """The mixer along the patches of x (B, M, P, dim), each variate on its own; causal unless bidirectional."""


class LinearTimeMixer(nn.Module):
    """One linear map along the patches of x (B, M, P, dim): the time half of the ablation "Mamba + linear time"."""

    mixes = "tokens"

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.linear = Linear(patches, patches)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(-1, -2)).transpose(-1, -2)


class VariateMixer(SequenceMixer):
    """The bidirectional mixer along the variates of x (B, M, P, dim), each patch position on its own."""

    axis = 1
    mixes = "channels"


def _mixers(c: TSM2Config, patches: int) -> list[nn.Module]:
    """One block: the time mixer and, unless it is ``none``, the variate mixer."""
    both = c.block == "bidirectional"
    found: list[nn.Module] = [
        TimeMixer(c.dim, expand=c.expand, state=c.state, conv=c.conv, bidirectional=both)
        if c.time_mixer == "scan"
        else LinearTimeMixer(patches)
    ]
    if c.variate_mixer == "mlp":
        found.append(FeatureMLP(c.dim))
    elif c.variate_mixer != "none":
        both = c.variate_mixer == "bidirectional"
        found.append(VariateMixer(c.dim, expand=c.expand, state=c.state, conv=c.conv, bidirectional=both))
    return found


class TimeFeatureNorm(nn.Module):
    """2-D normalisation: each variate of x (B, M, P, dim) over time and features at once, with a gain a feature."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1.0)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape[-2:]
        return F.layer_norm(x, shape, self.weight.expand(shape), self.bias.expand(shape))


class AuxiliaryInputs(nn.Module):
    """S_proj = Linear(S) and Z_proj = Linear(ChannelMixer(Z)), each (B, M, lookback), to stand beside the series.

    The input of the mixers becomes x ‖ Z_proj ‖ S_proj along the time, up to three times as long. Our reading of
    ChannelMixer(Z): the C_Z numbers of a step are embedded, mixed over the variates in both directions, and mapped to
    one number a step; Linear then maps T_Z steps to the look-back. No weight depends on the number of variates.
    """

    def __init__(self, config: TSM2Config) -> None:
        super().__init__()
        c = config
        self.config = config
        self.known_length = c.auxiliary.steps
        self.static = Linear(c.static_features, c.lookback) if c.static_features else None
        self.known_embed = Linear(c.future_features, c.dim) if c.future_features else None
        if self.known_embed is not None:
            self.known_mixer = SequenceMixer(c.dim, expand=c.expand, state=c.state, conv=c.conv, bidirectional=True)
            self.known_norm = nn.LayerNorm(c.dim)
            self.known_out = Linear(c.dim, 1)
            self.known_time = Linear(self.known_length, c.lookback)

    @property
    def parts(self) -> int:
        """How many sequences of the look-back's length are appended."""
        return (self.static is not None) + (self.known_embed is not None)

    def forward(self, static: Tensor | None, known: Tensor | None, x: Tensor) -> list[Tensor]:
        """static (B, M, C_S), known (B, T_Z, M, C_Z), x (B, M, L) → the projections that the model has, known first.

        Raises:
            ValueError: for an input that is missing, not wanted, or of another shape.
        """
        b, m, _ = x.shape
        c = self.config
        _check("static", static, (b, m, c.static_features), "model.static_features")
        _check(
            "known", known, (b, self.known_length, m, c.future_features), "model.future_features, model.future_length"
        )
        found = []
        if self.known_embed is not None:
            assert known is not None
            z = self.known_embed(known)
            z = z + self.known_mixer(self.known_norm(z).flatten(0, 1)).view(z.shape)
            found.append(self.known_time(self.known_out(z).squeeze(-1).transpose(1, 2)))
        if self.static is not None:
            assert static is not None
            found.append(self.static(static))
        return found


def _check(name: str, given: Tensor | None, shape: tuple[int, ...], keys: str) -> None:
    wanted = shape[-1] > 0
    if wanted and given is None:
        raise ValueError(f"{name} is missing: this model needs it with shape {shape} ({keys})")
    if given is not None and not wanted:
        raise ValueError(f"{name} was given, but this model was made without it ({keys})")
    if given is not None and torch.Size(shape) != given.shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}: this model needs {shape} ({keys})")


class LinearPath(Linear):
    """From the look-back to the horizon. It starts at 0: as the mean of the look-back, which the window norm takes."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


@dataclass(frozen=True)
class Forecasts:
    """``point`` (B, horizon, M); ``quantiles`` (B, horizon, M, Q), rising in Q; ``distribution`` of (B, horizon, M).

    All in the units of the input; what the model was not made for is None.
    """

    point: Tensor
    quantiles: Tensor | None = None
    distribution: StudentT | None = None


@MODELS.implements(TSM2Config)
class TSM2(nn.Module):
    """Forecaster: past (B, lookback, M) → future (B, horizon, M), in the units of its input.

    Raises:
        ValueError: for inputs whose shape is not the one that the model was made for.
    """

    def __init__(self, config: TSM2Config) -> None:
        super().__init__()
        self.config = config
        c = config
        self.auxiliary = AuxiliaryInputs(c) if c.static_features or c.future_features else None
        length = c.lookback * (1 + (self.auxiliary.parts if self.auxiliary else 0))
        patches = (length - c.patch_size) // c.patch_stride + 1
        self.embed = Linear(c.patch_size, c.dim)
        self.embed_missing = Linear(c.patch_size, c.dim, bias=False) if c.mask_input else None
        mixers = [mixer for _ in range(c.depth) for mixer in _mixers(c, patches)]
        norms: list[nn.Module] = [TimeFeatureNorm(c.dim) for _ in mixers]
        drops: list[nn.Module] = [SampleDropout(c.dropout) for _ in mixers]
        self.blocks = MixerStack(mixers, norms, drops, c.averaging)
        self.norm = TimeFeatureNorm(c.dim)
        self.head_drop = SampleDropout(c.dropout)
        self.head = Linear(patches * c.dim, c.horizon)
        extra = {"point": 0, "quantiles": len(c.quantiles), "student_t": 2}[c.output]
        self.spread = Linear(patches * c.dim, c.horizon * extra) if extra else None
        self.linear = LinearPath(c.lookback, c.horizon) if c.linear_path else None
        name_streams(self)

    def forward(
        self,
        past: Tensor,
        mask: Tensor | None = None,
        static: Tensor | None = None,
        known: Tensor | None = None,
        full: bool = False,
    ) -> Tensor | Forecasts:
        """The point forecast (B, horizon, M); with ``full`` also what ``config.output`` puts beside it.

        Args:
            past: (B, lookback, M).
            mask: (B, lookback, M), True where ``past`` was observed; what is not may hold anything, NaN too.
            static: (B, M, C_S), for a model with ``static_features``.
            known: (B, T_Z, M, C_Z), known in advance, for a model with ``future_features``.
            full: return :class:`Forecasts` instead of the point alone.
        """
        point, spread = self._forecast(past, mask, static, known)
        if not full:
            return point
        if spread is None:
            return Forecasts(point)
        if self.config.output == "quantiles":
            return Forecasts(point, quantiles=self._quantiles(point, spread))
        scale, freedom = spread.unbind(-1)
        return Forecasts(point, distribution=StudentT(2 + F.softplus(freedom), point, scale))

    def set_grad_checkpointing(self, enable: bool = True, every: int = 1) -> None:
        """Recompute every ``every``-th mixer's activations in the backward pass: less memory for more time."""
        self.blocks.checkpoint_every = every if enable else 0

    def _forecast(
        self, past: Tensor, mask: Tensor | None, static: Tensor | None, known: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The point (B, horizon, M) and the raw spread (B, horizon, M, K), its scale in the units of the input."""
        c = self.config
        if past.ndim != 3 or past.shape[1] != c.lookback:
            raise ValueError(f"past has shape {tuple(past.shape)}: give windows (B, {c.lookback}, variates)")
        if mask is not None and mask.shape != past.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}: give one of past's, {tuple(past.shape)}")
        seen = None if mask is None else mask.transpose(1, 2)
        x, mean, std = self._window_norm(past.transpose(1, 2), seen)
        y = self.norm(self.blocks(self._tokens(x, seen, static, known))).flatten(2)
        y = self.head_drop(y)
        future = self.head(y)
        if self.linear is not None:
            future = future + self.linear(x)
        point = (future * std + mean).transpose(1, 2)
        if self.spread is None:
            return point, None
        spread = self.spread(y).unflatten(-1, (c.horizon, -1)).transpose(1, 2)
        scale = (F.softplus(spread) * std.transpose(1, 2).unsqueeze(-1)).clamp(min=1e-6)
        # quantiles are spaced by scales; of the Student-t only the first number is one
        return point, scale if c.output == "quantiles" else torch.cat([scale[..., :1], spread[..., 1:]], -1)

    def _tokens(self, x: Tensor, seen: Tensor | None, static: Tensor | None, known: Tensor | None) -> Tensor:
        """Patches of x (B, M, L) and of the auxiliary inputs, embedded: (B, M, P, dim)."""
        c = self.config
        whole = x
        if self.auxiliary is not None:
            whole = torch.cat([x, *self.auxiliary(static, known, x)], -1)
        elif static is not None or known is not None:
            raise ValueError(
                "this model was made without auxiliary inputs: set model.static_features or future_features"
            )
        tokens = self.embed(whole.unfold(-1, c.patch_size, c.patch_stride))
        if self.embed_missing is not None and seen is not None:
            missing = F.pad((~seen).to(x.dtype), (0, whole.shape[-1] - x.shape[-1]))
            tokens = tokens + self.embed_missing(missing.unfold(-1, c.patch_size, c.patch_stride))
        return tokens

    def _window_norm(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, M, L) with what is missing at 0, and what the forecast gets back: mean, deviation (B, M, 1)."""
        x, count = (x, None) if seen is None else (x.masked_fill(~seen, 0), seen.sum(-1, keepdim=True).clamp(min=1))
        zero, one = x.new_zeros(*x.shape[:2], 1), x.new_ones(*x.shape[:2], 1)
        if self.config.window_norm == "none":
            return x, zero, one
        mean = x.mean(-1, keepdim=True) if count is None else x.sum(-1, keepdim=True) / count
        x = x - mean if seen is None else (x - mean).masked_fill(~seen, 0)
        if self.config.window_norm == "mean":
            return x, mean, one
        power = x.square().mean(-1, keepdim=True) if count is None else x.square().sum(-1, keepdim=True) / count
        std = torch.sqrt(power + 1e-5)
        return x / std, mean, std

    def _quantiles(self, point: Tensor, gaps: Tensor) -> Tensor:
        """Quantiles that never cross: rising by positive gaps, centred so that the middle one is at the point."""
        ladder = gaps.cumsum(-1)
        middle = min(range(len(self.config.quantiles)), key=lambda i: abs(self.config.quantiles[i] - 0.5))
        return point.unsqueeze(-1) + ladder - ladder[..., middle : middle + 1]

    def stage_parts(self) -> list[tuple[str, list[str], str]]:
        """Name, modules and module of the output of each row of the table of stages."""
        parts = [("embed", ["auxiliary", "embed", "embed_missing"], "embed")]
        count = len(self.blocks.mixers)
        for i, mixer in enumerate(self.blocks.mixers):
            name = f"mixer {i + 1} ({'variate' if getattr(mixer, 'mixes', '') == 'channels' else 'time'})"
            modules = [f"blocks.{kind}.{i}" for kind in ("averages", "norms", "mixers", "drops")]
            parts.append((name, modules, f"blocks.mixers.{i}"))
        head = [f"blocks.averages.{count}", "norm", "head_drop", "head", "spread", "linear"]
        return [*parts, ("head", head, "")]
