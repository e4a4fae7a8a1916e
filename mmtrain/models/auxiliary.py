"""Static and known-future inputs of TSM2 (paper, equations 21-24)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmtrain.config import TSM2Config
from mmtrain.models.linear import Linear
from mmtrain.models.mixers import SequenceMixer


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
        self.known_length = c.future_length or c.lookback + c.horizon
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
