"""Time float32 matrix products of ViM2-T and TSM2 with torch's BLAS and with oneDNN, forward and backward.

    python benchmarks/linear_cpu.py [--json FILE] [--smoke]

The product of a linear layer is (M, K) x (N, K)ᵀ; "dx" and "dw" are the products of its backward pass. The first line
names the library that ``mmtrain.ops.linear`` uses on this machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.ops.dense import _by_onednn, _product, linear_bwd

SIZES = [
    (12544, 96, 384),
    (12544, 192, 96),
    (3136, 192, 768),
    (784, 384, 1536),
    (196, 768, 3072),
    (28224, 32, 128),
    (28224, 64, 32),
]


def gflops(run: Callable[[], object], operations: float, turns: int) -> float:
    """Return the median rate of ``run`` in GFLOP/s, after one warm-up call."""
    run()
    times = []
    for _ in range(turns):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return operations / statistics.median(times) / 1e9


def products(x: Tensor, weight: Tensor, dy: Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return pairs of functions by name: the product with torch, and with oneDNN."""
    return {
        "forward": (lambda: torch.nn.functional.linear(x, weight), lambda: _product(x, weight)),
        "dx": (lambda: dy @ weight, lambda: linear_bwd(dy, x, weight, True, False)),
        "dw": (lambda: dy.T @ x, lambda: linear_bwd(dy, x, weight, False, True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as JSON")
    parser.add_argument("--smoke", action="store_true", help="use one small size to check that it runs")
    args = parser.parse_args()
    processor = platform.processor() or platform.machine()
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"mmtrain.ops.linear uses {'oneDNN' if _by_onednn() else 'torch'} here")
    print(f"{'(M, K, N)':>20}  {'product':>8}  {'torch GFLOP/s':>13}  {'oneDNN GFLOP/s':>14}  {'ratio':>5}")
    rows = []
    for size in [(300, 64, 40)] if args.smoke else SIZES:
        m, k, n = size
        x, weight, dy = torch.randn(m, k), torch.randn(n, k), torch.randn(m, n)
        for name, (by_torch, by_onednn) in products(x, weight, dy).items():
            slow, fast = (gflops(run, 2.0 * m * k * n, 3 if args.smoke else 15) for run in (by_torch, by_onednn))
            rows.append({"size": size, "product": name, "torch_gflops": slow, "onednn_gflops": fast})
            print(f"{size!s:>20}  {name:>8}  {slow:13.0f}  {fast:14.0f}  {fast / slow:5.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
