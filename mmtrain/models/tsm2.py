"""TSM2, the time-series MambaMixer (paper, section "TSM2").

- Each variate is divided into patches, which are embedded with shared weights.
- Blocks consist of a causal time mixer over the patches and a bidirectional mixer over the variates.
- Weighted averaging of earlier features replaces residual connections.
- Static and known-future inputs (equations 21-24) are appended to the series. Missing values can be masked. Quantiles
  or a Student t distribution can be forecast in addition to the point forecast.
- The shapes of the weights do not depend on the number of variates.
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
    """A mixer along the patches of x (B, M, P, dim), for each variate separately. It is causal unless bidirectional."""


class LinearTimeMixer(nn.Module):
    """A linear map along the patches of x (B, M, P, dim): the time mixer of the ablation "Mamba + linear time"."""

    mixes = "tokens"

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.linear = Linear(patches, patches)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(-1, -2)).transpose(-1, -2)


class VariateMixer(SequenceMixer):
    """A mixer along the variates of x (B, M, P, dim), for each patch position separately."""

    axis = 1
    mixes = "channels"


def _mixers(c: TSM2Config, patches: int) -> list[nn.Module]:
    """Return the mixers of one block: the time mixer and, unless it is ``none``, the variate mixer."""
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
    """2-D normalisation of x (B, M, P, dim) over patches and features, with a gain and a bias for each feature."""

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
    """Projections of the static input S and the known-future input Z to the length of the lookback.

    S_proj = Linear(S) and Z_proj = Linear(ChannelMixer(Z)) are (B, M, lookback) each. They are appended to x along
    time: x ‖ Z_proj ‖ S_proj is up to three times as long as x.

    ChannelMixer(Z) is our interpretation of the paper: the C_Z values of a time step are embedded, mixed over the
    variates in both directions, and mapped to one value per time step. The linear map then reduces T_Z time steps to
    the lookback.
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
        """Number of appended sequences, each as long as the lookback."""
        return (self.static is not None) + (self.known_embed is not None)

    def forward(self, static: Tensor | None, known: Tensor | None, x: Tensor) -> list[Tensor]:
        """Return the projections of the inputs that the model has, (B, M, lookback) each: known, then static.

        Args:
            static: (B, M, C_S).
            known: (B, T_Z, M, C_Z).
            x: (B, M, lookback) the series.

        Raises:
            ValueError: if an input is missing, unexpected or of the wrong shape.
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
    expected = shape[-1] > 0
    if expected and given is None:
        raise ValueError(f"{name} is missing: this model needs it with shape {shape} ({keys})")
    if given is not None and not expected:
        raise ValueError(f"{name} was given, but this model does not use it ({keys}): leave it out")
    if given is not None and torch.Size(shape) != given.shape:
        raise ValueError(f"{name} has shape {tuple(given.shape)}, expected {shape} ({keys})")


class LinearPath(Linear):
    """A linear map from the lookback to the forecast, initialised to 0.

    The initial forecast is then the mean of the lookback, which the window normalisation adds.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


@dataclass(frozen=True)
class Forecasts:
    """A forecast in the units of the input.

    Attributes:
        point: (B, horizon, M).
        quantiles: (B, horizon, M, Q), increasing along Q, or None if the model has no quantiles.
        distribution: Student t distribution of shape (B, horizon, M), or None if the model has none.
    """

    point: Tensor
    quantiles: Tensor | None = None
    distribution: StudentT | None = None


@MODELS.implements(TSM2Config)
class TSM2(nn.Module):
    """A forecaster that maps the past (B, lookback, M) to the future (B, horizon, M), in the units of the input."""

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
        """Return the point forecast (B, horizon, M), or :class:`Forecasts` if ``full``.

        Args:
            past: (B, lookback, M).
            mask: (B, lookback, M), True where ``past`` was observed. Other values are ignored and may be NaN.
            static: (B, M, C_S) static input, for a model with ``static_features``.
            known: (B, T_Z, M, C_Z) known-future input, for a model with ``future_features``.
            full: also return the quantiles or the distribution of ``config.output``.

        Raises:
            ValueError: if the shape of an input does not fit the configuration of the model.
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
        """Recompute the activations of every ``every``-th mixer in the backward pass, which saves memory."""
        self.blocks.checkpoint_every = every if enable else 0

    def _forecast(
        self, past: Tensor, mask: Tensor | None, static: Tensor | None, known: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the point forecast (B, horizon, M) and the spread (B, horizon, M, K), None for point models.

        The spread is the distances of the K quantiles, or the scale and the raw degrees of freedom of the Student t
        distribution. Distances and scale are in the units of the input.
        """
        c = self.config
        if past.ndim != 3 or past.shape[1] != c.lookback:
            raise ValueError(f"past has shape {tuple(past.shape)}, expected (B, {c.lookback}, variates)")
        if mask is not None and mask.shape != past.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected the shape of past, {tuple(past.shape)}")
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
        # all values are distances of quantiles; for the Student t distribution only the first is a scale
        return point, scale if c.output == "quantiles" else torch.cat([scale[..., :1], spread[..., 1:]], -1)

    def _tokens(self, x: Tensor, seen: Tensor | None, static: Tensor | None, known: Tensor | None) -> Tensor:
        """Return the embedded patches (B, M, P, dim) of x (B, M, lookback) and of the auxiliary inputs."""
        c = self.config
        whole = x
        if self.auxiliary is not None:
            whole = torch.cat([x, *self.auxiliary(static, known, x)], -1)
        elif static is not None or known is not None:
            raise ValueError(
                "static or known was given, but this model has no such input: set model.static_features or"
                " model.future_features"
            )
        tokens = self.embed(whole.unfold(-1, c.patch_size, c.patch_stride))
        if self.embed_missing is not None and seen is not None:
            missing = F.pad((~seen).to(x.dtype), (0, whole.shape[-1] - x.shape[-1]))
            tokens = tokens + self.embed_missing(missing.unfold(-1, c.patch_size, c.patch_stride))
        return tokens

    def _window_norm(self, x: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x (B, M, lookback) and set missing values to 0. Return it with the mean and deviation (B, M, 1)."""
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
        """Return quantiles that do not cross: cumulative sums of positive ``gaps``, with the median at ``point``."""
        ladder = gaps.cumsum(-1)
        middle = min(range(len(self.config.quantiles)), key=lambda i: abs(self.config.quantiles[i] - 0.5))
        return point.unsqueeze(-1) + ladder - ladder[..., middle : middle + 1]

    def stage_parts(self) -> list[tuple[str, list[str], str]]:
        """Return the rows of the table of stages: (name, modules of the stage, module whose output is shown)."""
        parts = [("embed", ["auxiliary", "embed", "embed_missing"], "embed")]
        count = len(self.blocks.mixers)
        for i, mixer in enumerate(self.blocks.mixers):
            name = f"mixer {i + 1} ({'variate' if getattr(mixer, 'mixes', '') == 'channels' else 'time'})"
            modules = [f"blocks.{kind}.{i}" for kind in ("averages", "norms", "mixers", "drops")]
            parts.append((name, modules, f"blocks.mixers.{i}"))
        head = [f"blocks.averages.{count}", "norm", "head_drop", "head", "spread", "linear"]
        return [*parts, ("head", head, "")]
