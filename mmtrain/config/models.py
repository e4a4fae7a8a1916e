"""The sections of the models: one class for each family, and the named sizes of each family."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from mmtrain.config.registry import Registry
from mmtrain.config.section import Section, replace, require
from mmtrain.errors import UserError, nearest

Count = Annotated[int, Field(ge=1)]
#: Maximum number of mixers in a stage: far above any real model, and low enough to build the model in seconds.
MOST_MIXERS = 1000


class ModelConfig(Section):
    """Keys of every model."""

    prefix: ClassVar[str] = "model."
    name: str = Field("", description="Name of the model. `mmtrain model` and `list_models()` list them.")

    def shrunk(self) -> Self:
        """Return the section of a small model of the same kind, for debugging."""
        return self


class ImageModelConfig(ModelConfig):
    """Keys of every model that maps images (B, in_channels, H, W) to logits (B, num_classes)."""

    num_classes: int = Field(1000, ge=1, description="Number of classes.")
    in_channels: int = Field(3, ge=1, description="Number of channels of the images.")


class ForecastInputs(NamedTuple):
    """The inputs of a forecaster in addition to the lookback.

    Attributes:
        static: width of the static input.
        future: width of the known-future input.
        steps: length T_Z of the known-future input in time steps.
        mask: whether a mask of the missing values is an input.
    """

    static: int
    future: int
    steps: int
    mask: bool


class ForecasterConfig(ModelConfig):
    """Keys of every model that maps series (B, lookback, M) to forecasts (B, horizon, M)."""

    lookback: int = Field(512, ge=1, description="Length of the input in time steps.")
    horizon: int = Field(96, ge=1, description="Length of the forecast in time steps.")

    @property
    def auxiliary(self) -> ForecastInputs:
        """The inputs in addition to the lookback. The default is none; models with such inputs override this."""
        return ForecastInputs(0, 0, self.lookback + self.horizon, False)


MODELS: Registry[ModelConfig] = Registry("model", "name", ModelConfig, "mmtrain.models")

# tiny, small and base are from the paper's table. nano and micro (for small images and machines), large and huge (for
# clusters) are additions.
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
    """ViM2 (paper, section "ViM2"): a stem, then stages of groups of two token mixers and one channel mixer."""

    patch_size: int = Field(4, ge=1, description="Side of the image patches in pixels.")
    dims: list[Count] = Field([96, 192, 384, 768], min_length=1, description="Width C of each stage.")
    token_mixers: list[Annotated[int, Field(le=MOST_MIXERS)]] = Field(
        [2, 2, 6, 2],
        description="Number of token mixers in each stage. It is even: a channel mixer follows every two token mixers.",
    )
    channel_expand: list[Count] = Field(
        [2, 2, 2, 1],
        description='Expansion of the channel mixers of each stage: their width divided by C ("CW-Linear").',
    )
    expand: int = Field(2, ge=1, description="Expansion of the token mixers: their width divided by C.")
    state: int = Field(16, ge=1, le=64, description="State size N of the selective scan.")
    window: int = Field(
        7,
        ge=1,
        description="Side of the windows of tokens; the tokens of a window are the features of a channel mixer.",
    )
    channel_conv: int = Field(4, ge=1, description="Kernel size of the convolution in channel mixers.")
    block: Literal["bidirectional", "unidirectional", "multi_scan", "shared_conv"] = Field(
        "shared_conv",
        description="Variant of the mixers. bidirectional, unidirectional, multi_scan, shared_conv: Fig. 1, 6, 7, 8 of"
        " the paper.",
    )
    channel_mixer: Literal["scan", "mlp", "none"] = Field(
        "scan", description="Type of the channel mixers: scan, mlp (the paper's ablation) or none (as in VMamba)."
    )
    averaging: bool = Field(True, description="Feed each mixer a weighted average of the outputs of earlier mixers.")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="Drop path rate of the last mixer; it rises linearly from 0 at the first."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key in ("token_mixers", "channel_expand"):
            value = getattr(self, key)
            cure = f"must have {len(self.dims)} entries, one for each stage of model.dims"
            require(len(value) == len(self.dims), f"model.{key}", value, cure)
        pairs = all(count >= 2 and count % 2 == 0 for count in self.token_mixers)
        cure = "must be even numbers of at least 2, because a channel mixer follows every two token mixers"
        require(pairs, "model.token_mixers", self.token_mixers, cure)
        return self

    def shrunk(self) -> Self:
        stages = len(self.dims)
        return replace(self, dims=[8 * 2**i for i in range(stages)], token_mixers=[2] * stages)


@MODELS.section("tsm2")
class TSM2Config(ForecasterConfig):
    """TSM2 (paper, section "TSM2"): patches of each variate, a causal time mixer and a bidirectional variate mixer.

    The shapes of the weights do not depend on the number of variates.
    """

    patch_size: int = Field(16, ge=1, description="Length of a patch in time steps.")
    patch_stride: int = Field(8, ge=1, description="Time steps between the starts of two patches.")
    dim: int = Field(32, ge=1, description="Width of a patch embedding.")
    depth: int = Field(
        2, ge=1, le=MOST_MIXERS, description="Number of blocks. A block is a time mixer and a variate mixer."
    )
    expand: int = Field(2, ge=1, description="Expansion of the mixers: their width divided by dim.")
    state: int = Field(16, ge=1, le=64, description="State size N of the selective scan.")
    conv: int = Field(4, ge=1, description="Kernel size of the convolution in the mixers.")
    dropout: float = Field(0.3, ge=0, lt=1, description="Dropout rate.")
    block: Literal["unidirectional", "bidirectional"] = Field(
        "unidirectional", description="Direction of the time mixers. The paper's TSM2 is unidirectional."
    )
    time_mixer: Literal["scan", "linear"] = Field(
        "scan",
        description='Type of the mixers along the patches: scan, or a linear map (the ablation "Mamba + linear time").',
    )
    variate_mixer: Literal["bidirectional", "forward", "mlp", "none"] = Field(
        "bidirectional",
        description="Type of the mixers across variates: a scan in both directions or forward only, an MLP, or none.",
    )
    averaging: bool = Field(True, description="Feed each mixer a weighted average of the outputs of earlier mixers.")
    window_norm: Literal["none", "mean", "standard"] = Field(
        "standard",
        description="Normalisation of each lookback, undone in the forecast. mean: subtract the mean; standard: also"
        " divide by the standard deviation.",
    )
    linear_path: bool = Field(False, description="Add a linear map from the lookback to the forecast.")
    static_features: int = Field(0, ge=0, description="Width C_S of the static input (paper, equations 21-24).")
    future_features: int = Field(0, ge=0, description="Width C_Z of the known-future input.")
    future_length: int = Field(
        0, ge=0, description="Length T_Z of the known-future input in time steps; 0: lookback + horizon."
    )
    mask_input: bool = Field(False, description="Add a mask of the missing values to the input of the model.")
    output: Literal["point", "quantiles", "student_t"] = Field(
        "point",
        description="Output of the model: a point forecast, or in addition quantiles or a Student t distribution.",
    )
    quantiles: list[float] = Field(
        [0.1, 0.5, 0.9], description="output=quantiles: levels of the quantiles, increasing, in (0, 1)."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        cure = f"must be at least model.patch_size ({self.patch_size})"
        require(self.lookback >= self.patch_size, "model.lookback", self.lookback, cure)
        rising = all(0 < q < 1 for q in self.quantiles) and sorted(set(self.quantiles)) == self.quantiles
        cure = "must be increasing numbers in (0, 1)"
        require(rising and len(self.quantiles) > 0, "model.quantiles", self.quantiles, cure)
        return self

    @property
    def auxiliary(self) -> ForecastInputs:
        steps = self.future_length or self.lookback + self.horizon
        return ForecastInputs(self.static_features, self.future_features, steps, self.mask_input)

    def shrunk(self) -> Self:
        return replace(self, dim=8, depth=1)


def preset(name: str, **overrides: Any) -> ModelConfig:
    """Return the section of the model ``name``, with ``overrides`` of its keys.

    Raises:
        UserError: for an unknown model or key; the message suggests the nearest one.
    """
    if name not in MODELS:
        raise UserError(f"unknown model '{name}'{nearest(name, MODELS)} (models: {', '.join(MODELS)})")
    known = [key for key in MODELS[name].model_fields if key != "name"]
    for key in overrides:
        if key not in known:
            raise UserError(f"model '{name}': unknown argument '{key}'{nearest(key, known)}")
    return MODELS.make(name, **overrides)
