"""Timing, description of the machine, and the two limits of a scan: memory bandwidth and rate of exp2."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl


@triton.jit
def exp2_rate(x, rounds, BLOCK: tl.constexpr):
    """Compute ``rounds`` exponentials for each of BLOCK numbers, in BLOCK / threads independent chains per thread."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    for _ in range(rounds):
        # exp2(-v) maps [0, 1] into itself: no overflow, no subnormal, no constant that the compiler could fold
        value = tl.exp2(-value)
    tl.store(x + at, value)


def seconds(run: Callable[[], object], device: torch.device, budget: float = 1.0, most: int = 50) -> float:
    """Return the median seconds of ``run`` after a warm-up, from CUDA events on a GPU and from the clock elsewhere."""
    for _ in range(3 if device.type == "cuda" else 1):
        run()
    times: list[float] = []
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    torch.cuda.synchronize(device)
    while not times or (sum(times) < budget and len(times) < most):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def bandwidth(device: torch.device, size: int) -> float:
    """Return the bytes per second, read and written, of copying ``size`` bytes."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)


def exponentials(device: torch.device, programs: int, rounds: int) -> float:
    """Return the number of exp2 per second."""
    block = 1024
    x = torch.rand(programs * block, device=device)
    return programs * block * rounds / seconds(lambda: exp2_rate[(programs,)](x, rounds, BLOCK=block), device)


def machine(device: torch.device) -> dict[str, str]:
    """Return the name of the device, the driver and the versions of the packages."""
    from mmtrain.ops import upstream

    found = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    for which, package in (("scan", "mamba-ssm"), ("conv", "causal-conv1d")):
        ok, reason = upstream.available(which)
        found[package] = "available" if ok else f"not available ({reason})"
    if device.type != "cuda":
        return {"device": f"{platform.processor() or platform.machine()}, Triton's interpreter: no timings"} | found
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        driver = f"unknown ({error})"
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    return {"device": f"{properties.name}, {count} multiprocessors", "driver": driver} | found
