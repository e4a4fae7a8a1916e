"""The sizes that are measured, and inputs for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CROSS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Shape:
    """One directional scan; ``channels`` is the expanded width."""

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
        """Positions times channels times directions times batch entries."""
        return self.batch * len(self.orders) * self.channels * self.length

    def exponentials(self, backward: bool) -> int:
        """The fewest: one a state and step, and once more to go back without having kept all states."""
        return self.steps * self.state * (2 if backward else 1)

    def traffic(self, itemsize: int, backward: bool) -> int:
        """Bytes that must move: every input once, every result once; in the backward pass again, with gradients."""
        shared = self.batch * self.channels * self.length * itemsize  # u, out
        rows = 2 * self.batch * len(self.orders) * self.state * self.length * itemsize  # B and C
        forward = 2 * shared + self.steps * itemsize + rows
        # u, delta, B, C, dout in; du, ddelta, dB, dC out
        return forward + (3 * shared + 2 * self.steps * itemsize + 2 * rows if backward else 0)


def shapes(batch: int) -> list[Shape]:
    """ViM2-T and -S (the same widths) and -B at 224, TSM2, and long sequences."""
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
    """Channels-last leaves with steps and A as at Mamba's initialisation; A, D and the bias float32."""
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
    """Grid positions in the order in which a direction meets them."""
    grid = torch.arange(shape.length, device=device).view(shape.height, shape.width)
    places = (grid.T if order >= 2 else grid).reshape(-1)
    return places.flip(0) if order % 2 else places
