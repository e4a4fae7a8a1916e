"""Time the C++ selective scan against a log-step parallel scan in plain PyTorch, forward and forward + backward.

    python benchmarks/scan_cpu.py [--smoke] [--json FILE] [--no-baseline]

The baseline is the Hillis–Steele scan that one writes without a kernel: log2(L) sweeps over Bt·L·D·N numbers. (The
reference of mmtrain.ops goes position by position, which takes minutes at these lengths.) A state update is one
(batch, position, channel, state) of the recurrence. Times are the median of several runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.ops import backend_report, selective_scan

SIZES = [(224, 63, 64), (4, 3136, 192), (8, 196, 768)]  # Bt, L, D
MORE_SIZES = [(448, 63, 64), (4000, 7, 64), (256, 192, 49)]
SMOKE_SIZES = [(2, 7, 8), (1, 40, 16)]
STATE = 16


def log_step_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The recurrence by recursive doubling. u, delta and the result (Bt, L, D); A (D, N); B, C (Bt, L, N); D (D,)."""
    decay = torch.exp(delta[..., None] * A)
    h = (delta * u)[..., None] * B[:, :, None, :]
    step = 1
    while step < u.shape[1]:
        # h_t += decay_t h_{t-step}: afterwards h_t holds the last 2·step terms, decay_t their product.
        new_h = h[:, step:] + decay[:, step:] * h[:, :-step]
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], dim=1)
        h = torch.cat([h[:, :step], new_h], dim=1)
        step *= 2
    return (h * C[:, :, None, :]).sum(-1) + D * u


def make_inputs(batch: int, length: int, channels: int) -> list[Tensor]:
    """Channels-last inputs with steps and A as at Mamba's initialisation."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, channels, generator=generator)
    delta = torch.rand(batch, length, channels, generator=generator) * 0.1
    A = -torch.arange(1.0, STATE + 1).repeat(channels, 1)
    B, C = (torch.randn(batch, length, STATE, generator=generator) for _ in range(2))
    return [u, delta, A, B, C, torch.ones(channels)]


def kernel_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """``selective_scan`` on the same channels-last tensors."""
    u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
    return selective_scan(u, delta, A, B, C, D).transpose(1, 2)


def seconds(run: Callable[[], object], budget: float = 2.0, most: int = 15) -> float:
    """Median wall-clock seconds of ``run``, after one warm-up."""
    run()
    times: list[float] = []
    while not times or (sum(times) < budget and len(times) < most):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(scan: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[float, float]:
    """Seconds of the forward alone and of forward + backward."""

    def forward() -> None:
        with torch.no_grad():
            scan(*inputs)

    leaves = [t.detach().requires_grad_() for t in inputs]
    grad = torch.randn_like(inputs[0])

    def both() -> None:
        torch.autograd.grad(scan(*leaves), leaves, grad)

    return seconds(forward), seconds(both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--no-baseline", action="store_true", help="time the kernel only (the baseline takes minutes)")
    parser.add_argument("--more", action="store_true", help="further sizes: short sequences, few channels")
    args = parser.parse_args()

    report = backend_report()
    print("  ".join(f"{key}={value}" for key, value in report.items() if value != ""))
    print(f"{'(Bt, L, D)':>16}  {'pass':>8}  {'kernel ms':>9}  {'G updates/s':>11}  {'plain ms':>9}  {'ratio':>7}")
    rows: list[dict[str, object]] = []
    for size in SMOKE_SIZES if args.smoke else SIZES + (MORE_SIZES if args.more else []):
        batch, length, channels = size
        inputs = make_inputs(batch, length, channels)
        kernel = measure(kernel_scan, inputs)
        plain = (None, None) if args.no_baseline else measure(log_step_scan, inputs)
        for name, fast, slow in zip(("forward", "fwd+bwd"), kernel, plain, strict=True):
            rate = batch * length * channels * STATE / fast
            ratio = None if slow is None else slow / fast
            rows.append(
                {"size": size, "state": STATE, "pass": name, "kernel_s": fast, "plain_s": slow}
                | {"ratio": ratio, "updates_per_s": rate}
            )
            plain_text = f"{'-':>9}  {'-':>7}" if slow is None else f"{slow * 1e3:9.1f}  {slow / fast:6.1f}x"
            print(f"{size!s:>16}  {name:>8}  {fast * 1e3:9.2f}  {rate / 1e9:11.2f}  {plain_text}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"backend": report, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
