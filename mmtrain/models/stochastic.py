"""Dropout and stochastic depth whose randomness belongs to the sample, not to the process.

In training the mask of a sample is a pure function of (its random key, the layer, the position in the activation).
So it is the same whatever the batch is split into, on any number of ranks, and after any restart, and there is no
generator state to save. Without keys (a model used from plain Python) the masks come from torch's generator.
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
    """Within the context, stochastic layers draw from ``keys`` (B,) int64: one random key a sample of the batch."""
    global _keys
    before, _keys = _keys, keys
    try:
        yield
    finally:
        _keys = before


def with_current_keys(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, to be called later (in a recomputation) with the keys that are in force now."""
    keys = _keys

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if keys is None:
            return function(*args, **kwargs)
        with sample_keys(keys):
            return function(*args, **kwargs)

    return call


def name_streams(model: nn.Module) -> None:
    """Give every stochastic layer of ``model`` its own stream of randomness, from its name."""
    for name, module in model.named_modules():
        if isinstance(module, _Stochastic):
            module.stream = zlib.crc32(name.encode())


def _seeds(x: Tensor, stream: int) -> Tensor:
    """One int32 for each sample of x (B, ...): of its key and the layer, or of torch's generator without keys."""
    if _keys is None:
        return torch.randint(-(2**31), 2**31, (x.shape[0],), dtype=torch.int32, device=x.device)
    if len(_keys) != x.shape[0]:
        raise ValueError(f"{len(_keys)} sample keys for a batch of {x.shape[0]}: the batch must stay dimension 0")
    low, high = (_keys + stream) & 0xFFFFFFFF, (_keys >> 32) & 0xFFFFFFFF
    return mix32(mix32(_to_int32(low)) ^ _to_int32(high)).to(x.device)


def _to_int32(x: Tensor) -> Tensor:
    """The low 32 bits of int64 ``x`` in [0, 2³²), as a signed number."""
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)


class _Stochastic(nn.Module):
    stream = 0

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def extra_repr(self) -> str:
        return f"drop={self.drop}"


class SampleDropout(_Stochastic):
    """Dropout of elements of x (B, ...) with probability ``drop``; what is kept is scaled by 1/(1 - drop)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        return keyed_dropout(x, _seeds(x, self.stream), self.drop)


class DropPath(_Stochastic):
    """Stochastic depth: drop the whole branch x (B, ...) of a sample with probability ``drop``, scale the kept ones."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        keep = keep_mask(_seeds(x, self.stream), 1, self.drop).view(-1, *[1] * (x.ndim - 1))
        return x * (keep * (1 / (1 - self.drop))).to(x.dtype)
