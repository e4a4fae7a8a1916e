"""The arguments of the operators: what a scan takes, the orders of a grid, and checks of tensors."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmtrain.errors import UserError, nearest


class ScanInputs(NamedTuple):
    """The arguments of one scan, as every backend takes them: those of ``selective_scan``, B and C (Bt, G, N, L)."""

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
        """All tensors in one dtype, u and delta also in those of ``kept``."""
        if all(not isinstance(t, Tensor) or t.dtype == dtype for t in self):
            return self
        u, delta = (t if t.dtype in kept else t.to(dtype) for t in self[:2])
        return ScanInputs(u, delta, *(t.to(dtype) if isinstance(t, Tensor) else t for t in self[2:]))  # type: ignore[arg-type]


class Order(NamedTuple):
    """Which axis runs fastest, ``rows`` (row-major) or ``columns`` (column-major), and whether from the end."""

    axis: str
    reverse: bool


#: How a scan may walk a grid of height × width positions, numbered row by row in memory. By code, as in the kernels.
ORDERS = (Order("rows", False), Order("rows", True), Order("columns", False), Order("columns", True))
#: The names of the codes.
NAMES = ("rows", "rows_reversed", "columns", "columns_reversed")


def check_orders(op: str, orders: Sequence[str]) -> None:
    """Raise UserError for an unknown order, or none at all."""
    if not orders:
        raise UserError(f"{op}: orders is empty; give some of {', '.join(NAMES)}")
    for name in orders:
        if name not in NAMES:
            raise UserError(f"{op}: order {name!r} is none of {', '.join(NAMES)}{nearest(name, NAMES)}")


@functools.lru_cache(maxsize=256)
def positions(orders: tuple[int, ...], height: int, width: int) -> Tensor:
    """(K, height · width) int64: the position in memory of every step of every order. Not to be written to."""
    grid = torch.arange(height * width).view(height, width)
    walks = [(grid if ORDERS[code].axis == "rows" else grid.T).flatten() for code in orders]
    return torch.stack(
        [walk.flip(0) if ORDERS[code].reverse else walk for code, walk in zip(orders, walks, strict=True)]
    )


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a forward on these should keep what the backward needs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class WrongType(UserError, TypeError):
    """An argument that is no tensor."""


def check_tensors(op: str, tensors: Mapping[str, object], optional: Collection[str] = ()) -> None:
    """Raise WrongType, with the argument, for what is no tensor; those that are ``optional`` may be None."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in optional):
            raise WrongType(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")


def check_floats(op: str, first: str, tensors: Mapping[str, Tensor | None], optional: Collection[str] = ()) -> None:
    """All tensors real floats on the device of ``tensors[first]``, and either all or none of them float64.

    Those that are ``optional`` may be None.

    Raises:
        UserError: naming the argument.
    """
    check_tensors(op, tensors, optional)
    lead = tensors[first]
    assert lead is not None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
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
