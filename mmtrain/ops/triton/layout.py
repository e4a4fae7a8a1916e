"""Memory layouts (the kernels read and write channels-last), and the GPU to launch on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def on_its_device(function: Callable[P, T]) -> Callable[P, T]:
    """With the GPU of its first tensor as the current one: Triton launches there, wherever the tensors are."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        tensor = next(a for a in args if isinstance(a, Tensor))
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            return function(*args, **kwargs)

    return run


def minor(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy, with its last dimension but one adjacent in memory."""
    if tensor.stride(-2) == 1 or tensor.shape[-2] == 1:
        return tensor
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def positions_adjacent(tensor: Tensor) -> bool:
    """Whether (..., D, L) is laid out along positions; then the result is, too."""
    return tensor.stride(-1) == 1 and tensor.stride(-2) != 1


def returned(dense: Tensor, like: Tensor) -> Tensor:
    """(..., L, D) dense as (..., D, L) in the layout of ``like``."""
    out = dense.transpose(-1, -2)
    return out.contiguous() if positions_adjacent(like) else out
