"""Memory layouts: the kernels read and write channels-last."""

from __future__ import annotations

from torch import Tensor


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
