"""Compare the C++ selective scan with scans in plain PyTorch, forward and forward + backward.

    python benchmarks/scan_cpu.py [--smoke] [--json FILE] [--no-baseline] [--more] [--reference]

The baseline ("plain") is the Hillis–Steele scan that one writes without a kernel: log2(L) sweeps over Bt·L·D·N numbers.
``--reference`` also times the reference of mmtrain.ops, which loops over the positions and takes minutes for long
sequences. A state update is one (batch, position, channel, state) of the recurrence and contains one exponential. "of
exp" is the share of the rate at which this machine computes exponentials only. Memory is the growth of the peak of a
fresh process in a pass, without the output and the gradients, divided by the size of the inputs; it contains states and
scratch memory. Times are medians of several runs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmtrain.ops import backend_report, scan_backend, selective_scan
from mmtrain.ops.cpu.library import ExpRateArgs, loaded

SIZES = [(224, 63, 64), (4, 3136, 192), (8, 196, 768)]  # Bt, L, D
MORE_SIZES = [(448, 63, 64), (4000, 7, 64), (256, 192, 49)]
SMOKE_SIZES = [(2, 7, 8), (1, 40, 16)]
STATE = 16


def log_step_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Compute the scan by recursive doubling. u, delta and the result (Bt, L, D); A (D, N); B, C (Bt, L, N); D (D,)."""
    decay = torch.exp(delta[..., None] * A)
    h = (delta * u)[..., None] * B[:, :, None, :]
    step = 1
    while step < u.shape[1]:
        # h_t += decay_t h_{t-step}: afterwards h_t contains the last 2·step terms, and decay_t the product of decays
        new_h = h[:, step:] + decay[:, step:] * h[:, :-step]
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], dim=1)
        h = torch.cat([h[:, :step], new_h], dim=1)
        step *= 2
    return (h * C[:, :, None, :]).sum(-1) + D * u


def make_inputs(batch: int, length: int, channels: int) -> list[Tensor]:
    """Return channels-last inputs with Δ and A as at the initialisation of Mamba."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(batch, length, channels, generator=generator)
    delta = torch.rand(batch, length, channels, generator=generator) * 0.1
    A = -torch.arange(1.0, STATE + 1).repeat(channels, 1)
    B, C = (torch.randn(batch, length, STATE, generator=generator) for _ in range(2))
    return [u, delta, A, B, C, torch.ones(channels)]


def kernel_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Call ``selective_scan`` on channels-last tensors."""
    u, delta, B, C = (t.transpose(1, 2) for t in (u, delta, B, C))
    return selective_scan(u, delta, A, B, C, D).transpose(1, 2)


def reference_scan(*inputs: Tensor) -> Tensor:
    """Call the reference of ``selective_scan``, which loops over the positions, on channels-last tensors."""
    with scan_backend("reference"):
        return kernel_scan(*inputs)


SCANS: dict[str, Callable[..., Tensor]] = {"kernel": kernel_scan, "plain": log_step_scan, "reference": reference_scan}


def seconds(run: Callable[[], object], budget: float = 2.0, most: int = 15) -> float:
    """Return the median wall-clock seconds of ``run``, after one warm-up call."""
    run()
    times: list[float] = []
    while not times or (sum(times) < budget and len(times) < most):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def passes(scan: Callable[..., Tensor], inputs: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """Return functions that run the forward pass, and the forward and backward pass."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    grad = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad():
            scan(*inputs)

    return {"forward": forward, "fwd+bwd": lambda: torch.autograd.grad(scan(*leaves), leaves, grad)}


def peak_growth(name: str, which: str, size: Sequence[int]) -> float:
    """Return the memory of one pass in a fresh process, without its results, divided by the size of its inputs."""
    command = [sys.executable, __file__, "--peak-of", name, which, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def peak_bytes() -> int:
    """Return the peak resident memory of this process. (getrusage would start with the peak of the parent process.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def print_peak_growth(name: str, which: str, *size: str) -> None:
    """Print the result of :func:`peak_growth`; runs in its process."""
    batch, length, channels = map(int, size)
    small = passes(SCANS[name], make_inputs(1, 8, 16))[which]
    small()  # load the library, which is not part of a pass
    inputs = make_inputs(batch, length, channels)
    run = passes(SCANS[name], inputs)[which]
    before = peak_bytes()
    run()
    given = sum(t.nbytes for t in inputs)
    results = inputs[0].nbytes + (given if which == "fwd+bwd" else 0)
    print(max(0, peak_bytes() - before - results) / given)


def exp_rate() -> float:
    """Return the exponentials per second of this machine, with the code and the threads of the kernels."""
    count, total = 2_000_000_000, ctypes.c_double()
    args = ExpRateArgs(count=count, sum=ctypes.addressof(total))
    return count / seconds(lambda: loaded().call("exp_rate", args), budget=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file as JSON")
    parser.add_argument("--smoke", action="store_true", help="use tiny sizes to check that it runs")
    parser.add_argument("--no-baseline", action="store_true", help="time the kernel only (the baseline takes minutes)")
    parser.add_argument("--reference", action="store_true", help="also time the reference")
    parser.add_argument("--more", action="store_true", help="also time short sequences and few channels")
    parser.add_argument("--peak-of", nargs=5, metavar="X", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak_growth(*args.peak_of)
        return

    report = backend_report()
    rate = exp_rate()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    print("  ".join(f"{key}={value}" for key, value in report.items() if value != ""))
    print(f"exponentials alone: {rate / 1e9:.1f} G/s")
    print(
        f"{'(Bt, L, D)':>16}  {'pass':>8}  {'kernel ms':>9}  {'G updates/s':>11}  {'of exp':>6}  {'memory':>6}  "
        f"{'plain ms':>9}  {'ratio':>7}  {'memory':>6}" + (f"  {'reference ms':>12}" if args.reference else "")
    )
    rows: list[dict[str, object]] = []
    for size in SMOKE_SIZES if args.smoke else SIZES + (MORE_SIZES if args.more else []):
        batch, length, channels = size
        inputs = make_inputs(batch, length, channels)
        for which in ("forward", "fwd+bwd"):
            fast = seconds(passes(kernel_scan, inputs)[which])
            slow = None if args.no_baseline else seconds(passes(log_step_scan, inputs)[which])
            oracle = seconds(passes(reference_scan, inputs)[which], most=1) if args.reference else None
            updates = batch * length * channels * STATE / fast
            memory = peak_growth("kernel", which, size)
            plain_memory = None if args.no_baseline else peak_growth("plain", which, size)
            rows.append(
                {"size": size, "state": STATE, "pass": which, "kernel_s": fast, "plain_s": slow, "reference_s": oracle}
                | {"ratio": None if slow is None else slow / fast, "updates_per_s": updates}
                | {"memory_over_inputs": memory, "plain_memory_over_inputs": plain_memory}
            )
            plain = f"{'-':>9}  {'-':>7}  {'-':>6}"
            if slow is not None:
                plain = f"{slow * 1e3:9.1f}  {slow / fast:6.1f}x  {plain_memory:5.0f}x"
            last = "" if oracle is None else f"  {oracle * 1e3:12.0f}"
            print(
                f"{size!s:>16}  {which:>8}  {fast * 1e3:9.2f}  {updates / 1e9:11.2f}  {updates / rate:6.0%}  "
                f"{memory:5.2f}x  {plain}{last}",
                flush=True,
            )
    if args.json:
        figures = {"backend": report, "torch": torch.__version__, "exp_per_s": rate, "rows": rows}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
