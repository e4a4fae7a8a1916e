"""Search for the fastest launch configurations on the GPU of this machine, and writing of the launch table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from mmtrain.ops.triton import aot, tuning
from mmtrain.ops.triton.api import causal_conv1d_triton
from mmtrain.ops.triton.tuning import Launch
from scan_gpu_parts.measure import seconds
from scan_gpu_parts.runs import ours
from scan_gpu_parts.shapes import CROSS, Shape, inputs


def scan_launches(kernel: str, state: int, smoke: bool) -> Iterator[Launch]:
    """Yield the launch configurations to try for a scan kernel and a state size."""
    if smoke:
        yield from (Launch(4, 1, 1), Launch(2, 1, 2))
    elif kernel == "scan_backward":
        # 4 to 16 states per thread
        for warps, unroll, registers, states in itertools.product((2, 4, 8), (1, 2, 4), (0, 128, 168), (4, 8, 16)):
            block = warps * 32 * states // max(state, 4)
            if 1 <= block <= 128:
                yield Launch(block, warps, unroll, 1, registers)
    else:
        for block, warps, unroll in itertools.product((2, 4, 8, 16, 32, 64), (1, 2), (1, 2, 4, 8)):
            if block <= 32 * warps and state <= block * state / warps <= 1024:
                yield Launch(block, warps, unroll)


def conv_launches(kernel: str, smoke: bool) -> Iterator[Launch]:
    """Yield the launch configurations to try for a convolution kernel."""
    if smoke:
        yield from (Launch(4, 1, 1), Launch(2, 1, 2))
    else:
        unrolls = (4, 8, 16, 32) if kernel == "conv_forward" else (2, 4, 8)
        for block, warps, unroll in itertools.product((32, 64, 128, 256), (1, 2, 4, 8), unrolls):
            yield Launch(block, warps, unroll)


def refuse_spills(kernel: str, launch: Launch, state: int, device: torch.device) -> None:
    """Refuse a configuration that spills registers to memory: the table must contain none.

    Raises:
        RuntimeError: If the configuration spills registers.
    """
    if device.type != "cuda":
        return
    arch = tuning.architecture(device)
    with tuning.override({kernel: launch}):
        for case in aot.cases(arch, ("bf16",), (state,)):
            if case.kernel == kernel and aot.compile_case(case, int(arch.removeprefix("sm_"))).spill:
                raise RuntimeError(f"spills registers ({case.variant})")


def scan_time(kernel: str, launch: Launch, shape: Shape, device: torch.device) -> float:
    """Return the seconds of the pass that contains the kernel."""
    refuse_spills(kernel, launch, shape.state, device)
    t = inputs(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    run = ours(shape).run
    both = {"scan_forward": launch, "scan_forward_few": launch} if kernel != "scan_backward" else {kernel: launch}
    with tuning.override(both):
        if kernel == "scan_backward":
            out = run(t)
            start = torch.ones_like(out)
            leaves = list(t.values())
            return seconds(lambda: torch.autograd.grad(out, leaves, start, retain_graph=True), device, 0.2, 10)
        with torch.no_grad():
            return seconds(lambda: run(t), device, 0.2, 10)


def conv_time(kernel: str, launch: Launch, sizes: tuple[int, int, int], device: torch.device) -> float:
    """Return the seconds of the pass that contains the kernel, with 4 taps and SiLU."""
    batch, length, channels = sizes
    x = torch.randn(batch, length, channels, device=device).transpose(1, 2).requires_grad_()
    weight = torch.randn(channels, 4, device=device, requires_grad=True)
    with tuning.override({kernel: launch}):
        if kernel == "conv_forward":
            with torch.no_grad():
                return seconds(lambda: causal_conv1d_triton(x, weight, None, True, False), device, 0.2, 10)
        out = causal_conv1d_triton(x, weight, None, True, False)
        start = torch.ones_like(out)
        return seconds(lambda: torch.autograd.grad(out, (x, weight), start, retain_graph=True), device, 0.2, 10)


def fastest(times: dict[Launch, float]) -> Launch:
    return min(times, key=lambda launch: times[launch])


def tune(device: torch.device, smoke: bool) -> dict[str, dict[str, Launch]]:
    """Return the fastest configuration by kernel and class. Prints all; skips those that do not compile or fit."""
    found: dict[str, dict[str, Launch]] = {}
    many, few = (2, 4) if smoke else (64, 2)
    for state in (2,) if smoke else tuning.STATES:
        for kernel in ("scan_forward", "scan_forward_few", "scan_backward"):
            batch = few if kernel.endswith("few") else many
            shape = (
                Shape(kernel, batch, 4, 2, 2, CROSS, state)
                if smoke
                else Shape(kernel, batch, 384, 28, 28, CROSS, state)
            )
            times: dict[Launch, float] = {}
            for launch in scan_launches(kernel, state, smoke):
                _try(times, launch, kernel, f"N={state}", lambda c: scan_time(kernel, c, shape, device))  # noqa: B023
            if times:
                found.setdefault(kernel, {})[tuning.state_class(state)] = fastest(times)
    for kernel in ("conv_forward", "conv_backward"):
        times = {}
        sizes = (2, 5, 4) if smoke else (448, 63, 128)
        for launch in conv_launches(kernel, smoke):
            _try(times, launch, kernel, "", lambda c: conv_time(kernel, c, sizes, device))  # noqa: B023
        if times:
            found[kernel] = {"any": fastest(times)}
    return found


def compare_chunks(device: torch.device, smoke: bool) -> dict[int, float]:
    """Return the seconds of the backward pass for several values of ``tuning.CHUNK``.

    The value is chosen by hand: half of it doubles the memory of saved states, and halves the scratch memory, which
    should fit into the L2 cache.
    """
    shape = Shape("chunks", 1, 4, 2, 4, CROSS, 2) if smoke else Shape("chunks", 64, 192, 56, 56, CROSS)
    found: dict[int, float] = {}
    for chunk in (4, 8) if smoke else (16, 32, 64, 128):
        with tuning.override(chunk=chunk):
            launch = tuning.lookup("scan_backward", tuning.state_class(shape.state), tuning.architecture(device))
            found[chunk] = scan_time("scan_backward", launch, shape, device)
    return found


def _try(times: dict[Launch, float], launch: Launch, kernel: str, what: str, time_it: object) -> None:
    assert callable(time_it)
    try:
        times[launch] = time_it(launch)
    except Exception as error:  # too much shared memory or too many registers for this GPU
        print(f"  {kernel} {what} {launch}: {type(error).__name__}: {error}"[:160])
        return
    print(f"  {kernel} {what} {launch}: {times[launch] * 1e3:.3f} ms", flush=True)


def write_table(new: dict[str, dict[str, dict[str, Launch]]], path: Path = tuning.TABLE) -> None:
    """Write ``new``, in the form of ``tuning.table()``, with one configuration per line."""
    lines: list[str] = []
    for arch, kernels in new.items():
        inner: list[str] = []
        for kernel, classes in kernels.items():
            rows = [f'   "{name}": {json.dumps(asdict(entry))}' for name, entry in classes.items()]
            inner.append(f'  "{kernel}": {{\n' + ",\n".join(rows) + "\n  }")
        lines.append(f' "{arch}": {{\n' + ",\n".join(inner) + "\n }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    tuning.table.cache_clear()
