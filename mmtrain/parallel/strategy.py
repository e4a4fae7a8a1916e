"""Apply data parallelism to a model from outside. The model knows nothing of it."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmtrain.parallel.ranks import Ranks


def wrap(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model that training steps call: itself alone, DistributedDataParallel among several ranks."""
    if ranks.world == 1:
        return model
    # a depthwise convolution of channels-last images gives its gradient in that layout; DDP copies it, which is right
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def deferred_reduction(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Gradients are reduced once a step: in the backward pass of its last micro-batch."""
    return nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
