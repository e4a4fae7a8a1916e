"""Arguments of the operators: the inputs of a scan, the scan orders of a grid, and checks of tensors."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmtrain.errors import UserError, nearest


class ScanInputs(NamedTuple):
    """The inputs of a scan for all backends: the arguments of ``selective_scan``, with B and C (Bt, G, N, L)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    delta_softplus: bool = False
    reverse: bool = False
    initial_state: Tensor | None = None

    def to(self, dtype: torch.dtype, kept: Sequence[torch.dtype] = ()) -> ScanInputs:
        """Convert all tensors to ``dtype``, except u and delta if their dtype is in ``kept``."""
        if all(not isinstance(t, Tensor) or t.dtype == dtype for t in self):
            return self
        u, delta = (t if t.dtype in kept else t.to(dtype) for t in self[:2])
        return ScanInputs(u, delta, *(t.to(dtype) if isinstance(t, Tensor) else t for t in self[2:]))  # type: ignore[arg-type]


class Order(NamedTuple):
    """A scan order: ``axis`` "rows" (row-major) or "columns" (column-major); ``reverse``: from the end."""

    axis: str
    reverse: bool


#: The orders in which a scan can visit a grid of height × width positions. The index is the code in the kernels.
ORDERS = (Order("rows", False), Order("rows", True), Order("columns", False), Order("columns", True))
#: The names of the orders.
NAMES = ("rows", "rows_reversed", "columns", "columns_reversed")


def check_orders(op: str, orders: Sequence[str]) -> None:
    """Raise UserError if ``orders`` is empty or contains an unknown name."""
    if not orders:
        raise UserError(f"{op}: no order given; give at least one of {', '.join(NAMES)}")
    for name in orders:
        if name not in NAMES:
            raise UserError(f"{op}: unknown order {name!r}{nearest(name, NAMES)} (known: {', '.join(NAMES)})")


@functools.lru_cache(maxsize=256)
def positions(orders: tuple[int, ...], height: int, width: int) -> Tensor:
    """Return the positions in memory that each scan order visits, step by step: (K, height · width) int64.

    The result is cached and must not be modified.

    Args:
        orders: K codes of orders, indices of :data:`ORDERS`.
    """
    grid = torch.arange(height * width).view(height, width)
    walks = [(grid if ORDERS[code].axis == "rows" else grid.T).flatten() for code in orders]
    return torch.stack(
        [walk.flip(0) if ORDERS[code].reverse else walk for code, walk in zip(orders, walks, strict=True)]
    )


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Return whether the forward pass must save tensors for the backward pass."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class WrongType(UserError, TypeError):
    """An argument that is not a tensor."""


def check_tensors(op: str, tensors: Mapping[str, object], optional: Collection[str] = ()) -> None:
    """Raise WrongType if a value is not a tensor; the message names it. Those in ``optional`` may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in optional):
            raise WrongType(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")


def check_floats(op: str, first: str, tensors: Mapping[str, Tensor | None], optional: Collection[str] = ()) -> None:
    """Check that all tensors are real floats on the device of ``tensors[first]``, and all or none of them float64.

    Args:
        op: name of the operator for messages.
        optional: names of the tensors that may be None.

    Raises:
        UserError: if one does not fit; the message names the argument.
    """
    check_tensors(op, tensors, optional)
    lead = tensors[first]
    assert lead is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{op}: {name} must have a real floating-point dtype, got {tensor.dtype}")
        if tensor.device != lead.device:
            where = f"{name} is on {tensor.device}, {first} is on {lead.device}"
            raise UserError(f"{op}: {where}; move them to one device")
        if (tensor.dtype == torch.float64) != (lead.dtype == torch.float64):
            raise UserError(
                f"{op}: {name} is {tensor.dtype}, {first} is {lead.dtype}; float64 cannot be mixed with other dtypes"
            )


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int], meaning: str) -> None:
    """Raise UserError unless ``tensor`` has the shape ``expected``.

    Args:
        meaning: the expected shape in letters, such as "(batch, D, N)".
    """
    if tuple(tensor.shape) != tuple(expected):
        raise UserError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {meaning} = {tuple(int(n) for n in expected)}"
        )


def layout_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` (Bt, D, L) in the memory layout of ``like``: contiguous, or a transposed view of (Bt, L, D)."""
    if like.stride(1) == 1 and like.stride(2) != 1:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()
