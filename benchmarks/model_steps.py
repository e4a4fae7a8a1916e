"""Compare training steps on the CPU: mmtrain's models with and without its kernels, and models of timm.

    python benchmarks/model_steps.py [--batch 4] [--rounds 5] [--json FILE] [--smoke] [--only vision|series]

A step is a float32 forward pass, a backward pass and the release of the gradients. All models run in one process. In
each round every model takes one step, so that other load on the machine affects all of them, and a row is the median
over the rounds. ViM2-T and TSM2 are compared with

- "unfused": the same model with the C++ scan, but with PyTorch operators for depthwise convolutions, SiLU,
  projections, flips, gates, matrix products and weighted averaging;
- "plain": the same model with a scan in plain PyTorch as well (parallel scan in log2(L) steps).

Images have 224 × 224 pixels. Windows are those of the forecasting benchmarks (512 → 96, 7 variates, dim 32, 2 blocks).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.config.models import preset
from mmtrain.models import build_model, create_model
from mmtrain.ops import Direction, scan_backend, selective_scan
from mmtrain.parallel.ranks import keep_freed_memory
from mmtrain.torchvision_compat import ensure_torchvision

TIMM = ("swin_tiny_patch4_window7_224", "convnext_tiny", "vit_small_patch16_224")


def unfused_mix(x: Tensor, directions: Sequence[Direction], gated: bool = False, height: int = 1) -> Tensor:
    """Compute ``selective_mix`` with PyTorch operators and ``selective_scan``, as one writes it without its kernel."""
    if x.dim() == 4:
        return unfused_mix(x.flatten(0, 1), directions, gated, height).unflatten(0, x.shape[:2])
    x, *gate = x.chunk(2, -1) if gated else (x,)
    batch, _, channels = x.shape
    total = torch.zeros((), dtype=x.dtype)
    for d in directions:
        by_column, reverse = d.order.startswith("columns"), d.order.endswith("reversed")
        u = x.reshape(batch, height, -1, channels).transpose(1, 2).reshape(x.shape) if by_column else x
        u = u.flip(1) if reverse else u
        if d.conv is not None:
            padded = F.pad(u.transpose(1, 2), (d.conv.shape[1] - 1, 0))
            u = F.silu(F.conv1d(padded, d.conv[:, None], d.conv_bias, groups=channels)).transpose(1, 2)
        low, b, c = F.linear(u, d.x_proj).split([d.dt_proj.shape[1], d.A.shape[1], d.A.shape[1]], -1)
        rows = [t.transpose(1, 2) for t in (u, F.linear(low, d.dt_proj), b, c)]
        y = selective_scan(rows[0], rows[1], d.A, rows[2], rows[3], d.D, delta_bias=d.dt_bias, delta_softplus=True)
        y = y.transpose(1, 2).flip(1) if reverse else y.transpose(1, 2)
        total = total + (y.reshape(batch, -1, height, channels).transpose(1, 2).reshape(x.shape) if by_column else y)
    mean = total / len(directions)
    return mean * F.silu(gate[0]) if gated else mean


def chained_sum(tensors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Compute ``weighted_sum`` with PyTorch operators."""
    total = tensors[0] * weight[0]
    for w, y in zip(weight[1:], tensors[1:], strict=True):
        total = torch.addcmul(total, y, w)
    return total


def torch_dropout(x: Tensor, seeds: Tensor, drop: float) -> Tensor:
    return F.dropout(x, drop)


@contextmanager
def unfused() -> Iterator[None]:
    with (
        mock.patch("mmtrain.models.s6.selective_mix", unfused_mix),
        mock.patch("mmtrain.models.mixers.selective_mix", unfused_mix),
        mock.patch("mmtrain.models.averaging.weighted_sum", chained_sum),
        mock.patch("mmtrain.models.mixers.linear", F.linear),
        mock.patch("mmtrain.models.stochastic.keyed_dropout", torch_dropout),
    ):
        yield


@contextmanager
def plain() -> Iterator[None]:
    with unfused(), scan_backend("parallel"):
        yield


@contextmanager
def as_it_is() -> Iterator[None]:
    yield


class Row(NamedTuple):
    name: str
    model: nn.Module
    mode: Callable[[], Any]
    x: Tensor


def step(row: Row) -> float:
    """Take one training step and return its seconds per sample."""
    with row.mode():
        begin = time.perf_counter()
        row.model(row.x).square().mean().backward()
        row.model.zero_grad(set_to_none=True)
        return (time.perf_counter() - begin) / len(row.x)


def compare(rows: Sequence[Row], rounds: int) -> dict[str, float]:
    """Return the median seconds per sample of every row. Plain rows, which are slow, take at most three steps."""
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for turn in range(-1, rounds):  # the first round is a warm-up
        for row in rows:
            if row.mode is plain and turn >= 3:
                continue
            spent = step(row)
            if turn >= 0:
                times[row.name].append(spent)
    return {name: statistics.median(found) for name, found in times.items()}


def vision(batch: int, rounds: int, smoke: bool) -> dict[str, float]:
    ensure_torchvision()
    import timm

    name, side = ("vim2_nano", 32) if smoke else ("vim2_tiny", 224)
    ours, x = create_model(name).train(), torch.randn(batch, 3, side, side)
    # the plain scan needs so much memory that only one image fits
    rows = [
        Row(name, ours, as_it_is, x),
        Row(f"{name} unfused", ours, unfused, x),
        Row(f"{name} plain", ours, plain, x[:1]),
    ]
    rows += [Row(other, timm.create_model(other).train(), as_it_is, x) for other in (() if smoke else TIMM)]
    return report("images", rows, compare(rows, rounds))


def series(batch: int, rounds: int, smoke: bool) -> dict[str, float]:
    size = {"lookback": 96, "dim": 8} if smoke else {"lookback": 512, "dim": 32}
    ours = build_model(preset("tsm2", horizon=96, depth=2, **size)).train()
    x = torch.randn(batch, size["lookback"], 7)
    rows = [Row("tsm2", ours, as_it_is, x), Row("tsm2 unfused", ours, unfused, x), Row("tsm2 plain", ours, plain, x)]
    return report("windows", rows, compare(rows, rounds))


def report(unit: str, rows: Sequence[Row], found: dict[str, float]) -> dict[str, float]:
    ours = rows[0].name
    print(f"\n{'model':<30}  {'parameters':>10}  {'batch':>5}  {'s/step':>8}  {unit + '/s':>10}  {'over ' + ours:>15}")
    for row in rows:
        size, spent = f"{sum(p.numel() for p in row.model.parameters()) / 1e6:.2f} M", found[row.name]
        print(
            f"{row.name:<30}  {size:>10}  {len(row.x):5}  {spent * len(row.x):8.3f}  {1 / spent:10.1f}  "
            f"{spent / found[ours]:14.2f}x",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=4, help="images per step (default: 4)")
    parser.add_argument("--windows", type=int, default=64, help="windows per step (default: 64)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as JSON")
    parser.add_argument("--only", choices=["vision", "series"])
    parser.add_argument("--smoke", action="store_true", help="use tiny models to check that it runs")
    args = parser.parse_args()
    torch.manual_seed(0)
    keep_freed_memory()  # as every training process does
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    rounds = 1 if args.smoke else args.rounds
    figures: dict[str, dict[str, float]] = {}
    if args.only != "series":
        figures["vision"] = vision(1 if args.smoke else args.batch, rounds, args.smoke)
    if args.only != "vision":
        figures["series"] = series(2 if args.smoke else args.windows, rounds, args.smoke)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "seconds_a_sample": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
