"""Measured sizes, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CROSS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Shape:
    """Size of a directional scan. ``channels`` is the expanded width."""

    name: str
    batch: int
    channels: int
    height: int
    width: int
    orders: tuple[int, ...]
    state: int = 16

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def steps(self) -> int:
        """Number of (sample, direction, channel, position) combinations."""
        return self.batch * len(self.orders) * self.channels * self.length

    def exponentials(self, backward: bool) -> int:
        """Return the minimal number of exponentials: one per state and step, and one more in the backward pass."""
        return self.steps * self.state * (2 if backward else 1)

    def traffic(self, itemsize: int, backward: bool) -> int:
        """Return the unavoidable traffic in bytes: every input and result once, also in the backward pass."""
        shared = self.batch * self.channels * self.length * itemsize  # u, out
        rows = 2 * self.batch * len(self.orders) * self.state * self.length * itemsize  # B and C
        forward = 2 * shared + self.steps * itemsize + rows
        # u, delta, B, C, dout in; du, ddelta, dB, dC out
        return forward + (3 * shared + 2 * self.steps * itemsize + 2 * rows if backward else 0)


def shapes(batch: int) -> list[Shape]:
    """Return the shapes of ViM2-T and -S (of equal width) and -B at 224, of TSM2, and of long sequences."""
    found = []
    for model, first in (("ViM2-T/S", 96), ("ViM2-B", 128)):
        for stage, side in enumerate((56, 28, 14, 7)):
            found.append(Shape(f"{model} stage {stage + 1}", batch, 2 * first << stage, side, side, CROSS))
    return [
        *found,
        Shape("TSM2 time", 448, 64, 1, 63, (0,)),
        Shape("TSM2 variates", 4032, 64, 1, 7, (0, 1)),
        *(Shape(f"long {side * side}", 1, 192, side, side, CROSS) for side in (64, 128, 256)),
        Shape("long 65536, one direction", 1, 192, 1, 65536, (0,)),
    ]


SMOKE = [Shape("grid", 1, 4, 2, 3, CROSS, 2), Shape("sequence", 2, 4, 1, 5, (1,), 2)]
CHECKED = [
    Shape("grid", 2, 40, 9, 13, CROSS),
    Shape("sequence", 3, 64, 1, 200, (0, 1)),
    Shape("one state", 2, 33, 5, 20, (2, 3), 1),
    Shape("long", 1, 32, 1, 3000, (0,)),
]

Inputs = dict[str, Tensor]


def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Return channels-last inputs with Δ and A as at the initialisation of Mamba. A, D and the bias are float32."""
    generator = torch.Generator(device).manual_seed(0)
    k, d, n, length = len(shape.orders), shape.channels, shape.state, shape.length

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    tensors = {
        "u": normal(shape.batch, 1, length, d).transpose(-1, -2).to(dtype),
        "delta": (normal(shape.batch, k, length, d) * 0.5).transpose(-1, -2).to(dtype),
        "A": -torch.arange(1.0, n + 1, device=device).repeat(k, d, 1),
        "B": normal(shape.batch, k, length, n).transpose(-1, -2).to(dtype),
        "C": normal(shape.batch, k, length, n).transpose(-1, -2).to(dtype),
        "D": torch.ones(k, d, device=device),
        "delta_bias": torch.rand(k, d, generator=generator, device=device) * 4 - 6,
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def walk(order: int, shape: Shape, device: torch.device) -> Tensor:
    """Return the grid positions in the order of a direction."""
    grid = torch.arange(shape.length, device=device).view(shape.height, shape.width)
    places = (grid.T if order >= 2 else grid).reshape(-1)
    return places.flip(0) if order % 2 else places
