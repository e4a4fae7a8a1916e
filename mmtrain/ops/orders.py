"""The orders in which a scan may walk a grid of height × width positions, numbered row by row in memory."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmtrain.errors import UserError, nearest


class Order(NamedTuple):
    """Which axis runs fastest, ``rows`` (row-major) or ``columns`` (column-major), and whether from the end."""

    axis: str
    reverse: bool


#: By code, as the kernels number them.
ORDERS = (Order("rows", False), Order("rows", True), Order("columns", False), Order("columns", True))
#: The names of the codes.
NAMES = ("rows", "rows_reversed", "columns", "columns_reversed")


def codes(op: str, orders: Sequence[str]) -> tuple[int, ...]:
    """The codes of order names.

    Raises:
        UserError: an unknown name, or none at all.
    """
    if not orders:
        raise UserError(f"{op}: orders is empty; give some of {', '.join(NAMES)}")
    for name in orders:
        if name not in NAMES:
            raise UserError(f"{op}: order {name!r} is none of {', '.join(NAMES)}{nearest(name, NAMES)}")
    return tuple(NAMES.index(name) for name in orders)


@functools.lru_cache(maxsize=256)
def positions(orders: tuple[int, ...], height: int, width: int) -> Tensor:
    """(K, height · width) int64: the position in memory of every step of every order. Not to be written to."""
    grid = torch.arange(height * width).view(height, width)
    walks = [(grid if ORDERS[code].axis == "rows" else grid.T).flatten() for code in orders]
    return torch.stack(
        [walk.flip(0) if ORDERS[code].reverse else walk for code, walk in zip(orders, walks, strict=True)]
    )
