"""Argument checks and memory layout helpers shared by the scan and the convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmtrain.errors import UserError


def check_floats(op: str, first: str, tensors: dict[str, Tensor | None]) -> None:
    """All tensors real floats on the device of ``tensors[first]``, and either all or none of them float64.

    Raises:
        UserError: naming the argument.
    """
    lead = tensors[first]
    assert lead is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise UserError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{op}: {name} must be real floating point, got {tensor.dtype}")
        if tensor.device != lead.device:
            raise UserError(f"{op}: {name} is on {tensor.device}, {first} on {lead.device}; move them to one device")
        if (tensor.dtype == torch.float64) != (lead.dtype == torch.float64):
            raise UserError(
                f"{op}: {name} is {tensor.dtype}, {first} is {lead.dtype}; float64 does not mix with other dtypes"
            )


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Raise UserError unless ``tensor`` has the expected shape; ``meaning`` spells it in letters."""
    if tuple(tensor.shape) != tuple(expected):
        raise UserError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {meaning} = {tuple(int(n) for n in expected)}"
        )


def layout_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` (Bt, D, L), in channels-last memory if ``like`` is the transposed view of a (Bt, L, D) tensor."""
    if like.stride(1) == 1 and like.stride(2) != 1:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()
