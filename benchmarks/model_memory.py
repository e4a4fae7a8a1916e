"""Print how the memory that autograd saves for the backward pass grows with sequence length, width and image size.

python benchmarks/model_memory.py
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmtrain.models import create_model
from mmtrain.models.mixers import ImageChannelMixer, ImageTokenMixer, SequenceMixer


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes of the storages that ``module(x)`` saves for its backward pass, without parameters.

    A storage counts once and as a whole, however many views of it are saved. The input counts if it is saved.
    """
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # keep it alive, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in parameters)


@dataclass(frozen=True)
class Series:
    """One table. ``along`` names the size that grows; ``module(size)`` takes an input of shape ``shape(size)``."""

    name: str
    along: str
    sizes: tuple[int, ...]
    module: Callable[[int], nn.Module]
    shape: Callable[[int], tuple[int, ...]]

    def measure(self) -> Iterator[tuple[int, int]]:
        """Yield (size, bytes) for every size."""
        for size in self.sizes:
            yield size, saved_bytes(self.module(size), torch.randn(self.shape(size), requires_grad=True))


def _tsm2(lookback: int, dim: int) -> nn.Module:
    return create_model("tsm2", lookback=lookback, dim=dim, dropout=0.0)


def _of_width_64(mixer: Callable[[int], nn.Module], size: int) -> nn.Module:
    return mixer(64)


def all_series() -> list[Series]:
    """Return the tables of all blocks and both models, along each axis for which the paper claims a linear cost.

    Images are square or twice as wide as high.
    """
    lengths, widths, variates = (256, 512, 1024, 2048), (64, 128, 192, 256), (25, 50, 100, 200)
    tokens, pixels = (14 * 14, 14 * 28, 28 * 28, 28 * 56), (112 * 112, 112 * 224, 224 * 224, 224 * 448)

    def grid(area: int) -> tuple[int, int]:
        height = math.isqrt(area) if math.isqrt(area) ** 2 == area else math.isqrt(area // 2)
        return height, area // height

    found = [
        Series("SequenceMixer(64)", "L", lengths, lambda n: SequenceMixer(64), lambda n: (1, n, 64)),
        Series(
            "SequenceMixer(64), two directions",
            "L",
            lengths,
            lambda n: SequenceMixer(64, bidirectional=True),
            lambda n: (1, n, 64),
        ),
        Series("SequenceMixer", "D", widths, SequenceMixer, lambda d: (1, 512, d)),
    ]
    image_mixers: dict[str, Callable[[int], nn.Module]] = {
        "ImageTokenMixer": ImageTokenMixer,
        "ImageChannelMixer": ImageChannelMixer,
    }
    for name, mixer in image_mixers.items():
        found += [
            Series(f"{name}(64)", "H·W", tokens, functools.partial(_of_width_64, mixer), lambda n: (1, *grid(n), 64)),
            Series(name, "D", widths, mixer, lambda d: (1, 14, 14, d)),
        ]
    return [
        *found,
        Series("tsm2", "lookback", lengths, lambda n: _tsm2(n, 32), lambda n: (1, n, 7)),
        Series("tsm2", "variates", variates, lambda m: _tsm2(512, 32), lambda m: (1, 512, m)),
        Series("tsm2", "D", widths, lambda d: _tsm2(512, d), lambda d: (1, 512, 7)),
        Series("vim2_micro", "pixels", pixels, lambda n: create_model("vim2_micro"), lambda n: (1, 3, *grid(n))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.parse_args()
    print("Memory saved for the backward pass of one float32 sample. Slope: additional bytes per unit of size")
    for series in all_series():
        print(f"\n{series.name}\n{series.along:>10} {'MiB':>9} {'slope':>10}")
        before: tuple[int, int] | None = None
        for size, kept in series.measure():
            slope = f"{(kept - before[1]) / (size - before[0]):10.1f}" if before else ""
            print(f"{size:>10} {kept / 2**20:>9.2f} {slope}")
            before = size, kept


if __name__ == "__main__":
    main()
