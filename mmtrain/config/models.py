"""Architectures as data: one section class for each family, and the named sizes of each."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from mmtrain.config.registry import Registry
from mmtrain.config.section import Section, replace, require
from mmtrain.errors import UserError, nearest

Count = Annotated[int, Field(ge=1)]
#: Of one stage. Far more than anybody trains, and few enough for a model with them to be built in seconds.
MOST_MIXERS = 1000


class ModelConfig(Section):
    """The keys that every architecture has."""

    prefix: ClassVar[str] = "model."
    name: str = Field("", description="The model: one of the names that `mmtrain model` and `list_models()` show.")

    def shrunk(self) -> Self:
        """A small model of the same kind, for debugging."""
        return self


class ImageModelConfig(ModelConfig):
    """The keys of every model that takes images (B, in_channels, H, W) and gives logits (B, num_classes)."""

    num_classes: int = Field(1000, ge=1, description="Classes of the head.")
    in_channels: int = Field(3, ge=1, description="Channels of the images.")


class ForecastInputs(NamedTuple):
    """What a forecaster takes beside the past: widths of the static and of the known-future input; a mask.

    ``steps``: T_Z, the length of the known-future input.
    """

    static: int
    future: int
    steps: int
    mask: bool


class ForecasterConfig(ModelConfig):
    """The keys of every model that takes series (B, lookback, M) and gives forecasts (B, horizon, M)."""

    lookback: int = Field(512, ge=1, description="Steps of the window that the model sees.")
    horizon: int = Field(96, ge=1, description="Steps of the forecast.")

    @property
    def auxiliary(self) -> ForecastInputs:
        """The inputs beside the past: none, unless a model says otherwise."""
        return ForecastInputs(0, 0, self.lookback + self.horizon, False)


MODELS: Registry[ModelConfig] = Registry("model", "name", ModelConfig, "mmtrain.models")

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


@MODELS.section(**_VIM2_SIZES)
class ViM2Config(ImageModelConfig):
    """ViM2 (paper, section "ViM2"): a stem, then stages of [token, token, channel] mixer groups."""

    patch_size: int = Field(4, ge=1, description="Side in pixels of the patches that the stem embeds.")
    dims: list[Count] = Field([96, 192, 384, 768], min_length=1, description="Width C of each stage.")
    token_mixers: list[Annotated[int, Field(le=MOST_MIXERS)]] = Field(
        [2, 2, 6, 2], description="Token mixers of each stage, an even number: a channel mixer follows every two."
    )
    channel_expand: list[Count] = Field(
        [2, 2, 2, 1], description='Width of the channel mixers of each stage, in multiples of C ("CW-Linear").'
    )
    expand: int = Field(2, ge=1, description="Width of the token mixers, in multiples of C.")
    state: int = Field(16, ge=1, le=64, description="States of each channel of the selective scan.")
    window: int = Field(7, ge=1, description="Side of the windows whose tokens are the features of a channel mixer.")
    channel_conv: int = Field(4, ge=1, description="Length of the channel mixers' convolution.")
    block: Literal["bidirectional", "unidirectional", "multi_scan", "shared_conv"] = Field(
        "shared_conv", description="Variant of the mixers: Fig. 1, 6, 7 and 8 of the paper, in this order."
    )
    channel_mixer: Literal["scan", "mlp", "none"] = Field(
        "scan", description="Channel mixer: scan, mlp (the paper's ablation) or none (VMamba-like)."
    )
    averaging: bool = Field(True, description="Weighted averaging of the outputs of earlier mixers.")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Stochastic depth: the rate of the last mixer.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key in ("token_mixers", "channel_expand"):
            value = getattr(self, key)
            cure = f"it needs one entry for each of the {len(self.dims)} stages of model.dims"
            require(len(value) == len(self.dims), f"model.{key}", value, cure)
        pairs = all(count >= 2 and count % 2 == 0 for count in self.token_mixers)
        require(pairs, "model.token_mixers", self.token_mixers, "two per channel mixer")
        return self

    def shrunk(self) -> Self:
        stages = len(self.dims)
        return replace(self, dims=[8 * 2**i for i in range(stages)], token_mixers=[2] * stages)


@MODELS.section("tsm2")
class TSM2Config(ForecasterConfig):
    """TSM2 (paper, section "TSM2"): patches of each variate, causal time mixer, bidirectional variate mixer.

    No weight depends on the number of variates.
    """

    patch_size: int = Field(16, ge=1, description="Steps of a patch.")
    patch_stride: int = Field(8, ge=1, description="Steps from one patch to the next.")
    dim: int = Field(32, ge=1, description="Width of the embedding of a patch.")
    depth: int = Field(2, ge=1, le=MOST_MIXERS, description="Blocks of a time mixer and a variate mixer.")
    expand: int = Field(2, ge=1, description="Width of the mixers, in multiples of dim.")
    state: int = Field(16, ge=1, le=64, description="States of each channel of the selective scan.")
    conv: int = Field(4, ge=1, description="Length of the mixers' convolution.")
    dropout: float = Field(0.3, ge=0, lt=1, description="Dropout rate.")
    block: Literal["unidirectional", "bidirectional"] = Field(
        "unidirectional", description="Directions in time: unidirectional (the paper's TSM2) or bidirectional."
    )
    time_mixer: Literal["scan", "linear"] = Field(
        "scan", description='Mixer along the patches: scan, or one linear map (the ablation "Mamba + linear time").'
    )
    variate_mixer: Literal["bidirectional", "forward", "mlp", "none"] = Field(
        "bidirectional", description="Mixer across the variates."
    )
    averaging: bool = Field(True, description="Weighted averaging of the outputs of earlier mixers.")
    window_norm: Literal["none", "mean", "standard"] = Field(
        "standard",
        description="What is taken from each look-back window and given back to the forecast: nothing, the mean, or"
        " mean and standard deviation.",
    )
    linear_path: bool = Field(False, description="Add a linear map from the look-back to the horizon.")
    static_features: int = Field(0, ge=0, description="Width C_S of the static input (paper, equations 21-24).")
    future_features: int = Field(0, ge=0, description="Width C_Z of the known-future input.")
    future_length: int = Field(
        0, ge=0, description="T_Z, the steps of the known-future input; 0: look-back and horizon."
    )
    mask_input: bool = Field(False, description="Let the model see where values are missing.")
    output: Literal["point", "quantiles", "student_t"] = Field(
        "point", description="The point forecast alone, or with quantiles or a Student t distribution."
    )
    quantiles: list[float] = Field([0.1, 0.5, 0.9], description="Levels for output=quantiles: rising, in (0, 1).")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        cure = f"it must hold at least one patch (model.patch_size is {self.patch_size})"
        require(self.lookback >= self.patch_size, "model.lookback", self.lookback, cure)
        rising = all(0 < q < 1 for q in self.quantiles) and sorted(set(self.quantiles)) == self.quantiles
        require(rising and len(self.quantiles) > 0, "model.quantiles", self.quantiles, "give rising numbers in (0, 1)")
        return self

    @property
    def auxiliary(self) -> ForecastInputs:
        steps = self.future_length or self.lookback + self.horizon
        return ForecastInputs(self.static_features, self.future_features, steps, self.mask_input)

    def shrunk(self) -> Self:
        return replace(self, dim=8, depth=1)


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The configuration of a named model.

    Raises:
        UserError: for an unknown name or argument, with the nearest one.
    """
    if name not in MODELS:
        raise UserError(f"unknown model '{name}'{nearest(name, MODELS)} (models: {', '.join(MODELS)})")
    known = [key for key in MODELS[name].model_fields if key != "name"]
    for key in overrides:
        if key not in known:
            raise UserError(f"model '{name}' has no argument '{key}'{nearest(key, known)}")
    return MODELS.make(name, **overrides)
