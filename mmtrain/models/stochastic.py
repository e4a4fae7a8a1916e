"""Dropout and drop path with masks that depend on the sample, not on the process.

In training, the mask of a sample is a pure function of its random key, the layer and the position in the activation.
It does not depend on how the batch is split over ranks and micro-batches, it is the same after a restart, and there is
no generator state to save. Without random keys, as in plain Python code, the masks come from torch's generator.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from mmtrain.ops import keyed_dropout
from mmtrain.ops.elementwise import keep_mask, mix32

P = ParamSpec("P")
R = TypeVar("R")

_keys: Tensor | None = None


@contextmanager
def sample_keys(keys: Tensor) -> Iterator[None]:
    """Use random keys in the stochastic layers within the context.

    Args:
        keys: (B,) int64, one random key per sample of the batch.
    """
    global _keys
    before, _keys = _keys, keys
    try:
        yield
    finally:
        _keys = before


def with_current_keys(function: Callable[P, R]) -> Callable[P, R]:
    """Wrap ``function`` so that later calls, as in a recomputation, use the random keys that are active now."""
    keys = _keys

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if keys is None:
            return function(*args, **kwargs)
        with sample_keys(keys):
            return function(*args, **kwargs)

    return call


def name_streams(model: nn.Module) -> None:
    """Set the random stream of every stochastic layer of ``model`` to a hash of its name."""
    for name, module in model.named_modules():
        if isinstance(module, _Stochastic):
            module.stream = zlib.crc32(name.encode())


def _seeds(x: Tensor, stream: int) -> Tensor:
    """Return a seed (int32) for each sample of x (B, ...), from its key and the layer, or from torch's generator."""
    if _keys is None:
        return torch.randint(-(2**31), 2**31, (x.shape[0],), dtype=torch.int32, device=x.device)
    if len(_keys) != x.shape[0]:
        raise ValueError(f"{len(_keys)} random keys for a batch of {x.shape[0]}: dimension 0 must be the batch")
    low, high = (_keys + stream) & 0xFFFFFFFF, (_keys >> 32) & 0xFFFFFFFF
    return mix32(mix32(_to_int32(low)) ^ _to_int32(high)).to(x.device)


def _to_int32(x: Tensor) -> Tensor:
    """Reinterpret int64 ``x`` in [0, 2³²) as signed 32-bit integers."""
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


class _Stochastic(nn.Module):
    stream = 0

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def extra_repr(self) -> str:
        return f"drop={self.drop}"


class SampleDropout(_Stochastic):
    """Dropout: set elements of x (B, ...) to 0 with probability ``drop`` and multiply the others by 1/(1 - drop)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        return keyed_dropout(x, _seeds(x, self.stream), self.drop)


class DropPath(_Stochastic):
    """Drop path: set whole samples of x (B, ...) to 0 with probability ``drop``; scale the others by 1/(1 - drop)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        keep = keep_mask(_seeds(x, self.stream), 1, self.drop).view(-1, *[1] * (x.ndim - 1))
        return x * (keep * (1 / (1 - self.drop))).to(x.dtype)
