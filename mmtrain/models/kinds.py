"""Token or channel: which of the two a mixer is, in the paper's sense."""

from __future__ import annotations

from torch import nn

from mmtrain.models.mixers import FeatureMLP, ImageChannelMixer
from mmtrain.models.tsm2 import VariateMixer


def is_channel_mixer(mixer: nn.Module) -> bool:
    """Whether ``mixer`` mixes channels: TSM2's variates count as such, so does an MLP in a channel mixer's place."""
    return isinstance(mixer, ImageChannelMixer | VariateMixer | FeatureMLP)


def mixer_labels(mixers: nn.ModuleList) -> list[str]:
    """T1, T2, C1, …: token and channel mixers numbered each on their own, in order."""
    seen = {"T": 0, "C": 0}
    labels = []
    for mixer in mixers:
        kind = "C" if is_channel_mixer(mixer) else "T"
        seen[kind] += 1
        labels.append(f"{kind}{seen[kind]}")
    return labels
