"""Check and time the Triton scan on the GPU of this machine, and compare it with the limits of the GPU.

    python benchmarks/scan_gpu.py [--batch 32] [--json FILE] [--no-models]
    python benchmarks/scan_gpu.py --tune        # time launch configurations, write the fastest into the table
    python benchmarks/scan_gpu.py --smoke       # tiny sizes under Triton's interpreter on a CPU, to check that it runs

It first compares outputs and gradients with float64. Then it prints times (medians, CUDA events) of mmtrain's scan, and
of its composition without this kernel: copies in every order, a 1-D scan (of mmtrain, and of mamba-ssm if it is
installed), and the sum. GB/s counts the unavoidable traffic: each input and result once. The roof is the larger of two
times: this traffic at the bandwidth of a copy, and the exponentials at the rate of a kernel that computes only these.
Both rates are measured first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

SMOKE = "--smoke" in sys.argv
if SMOKE:  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from scan_gpu_parts import models, tune  # noqa: E402
from scan_gpu_parts.measure import bandwidth, exponentials, machine, seconds  # noqa: E402
from scan_gpu_parts.runs import Candidate, candidates, errors  # noqa: E402
from scan_gpu_parts.shapes import CHECKED, Shape, inputs, shapes  # noqa: E402
from scan_gpu_parts.shapes import SMOKE as SMOKE_SHAPES  # noqa: E402

from mmtrain.ops.triton import tuning  # noqa: E402

ALLOWED = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 4e-2)}  # of outputs, of gradients
console = Console(width=150)
Row = dict[str, object]


def check(dtypes: list[torch.dtype], device: torch.device) -> tuple[list[Row], bool]:
    """Return the errors of every candidate, and whether all are within the tolerances."""
    rows: list[Row] = []
    table = Table("shape", "dtype", "run", "output", "gradients", "", title="Largest error over largest element")
    right = True
    for dtype in dtypes:
        for shape in SMOKE_SHAPES if SMOKE else CHECKED:
            for name, (output, gradients) in errors(shape, inputs(shape, dtype, device)).items():
                good = output <= ALLOWED[dtype][0] and gradients <= ALLOWED[dtype][1]
                right &= good
                verdict = "ok" if good else "WRONG"
                table.add_row(shape.name, str(dtype), name, f"{output:.1e}", f"{gradients:.1e}", verdict)
                row = {"shape": shape.name, "dtype": str(dtype), "run": name, "output": output}
                rows.append(row | {"gradients": gradients, "ok": good})
    console.print(table)
    return rows, right


def time_run(candidate: Candidate, shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Return the seconds of the forward pass, and of the forward and backward pass."""
    run, t = candidate.run, candidate.prepare(inputs(shape, dtype, device))
    leaves = list(t.values())
    with torch.no_grad():
        forward = seconds(lambda: run(t), device)
    start = torch.ones(shape.batch, shape.channels, shape.length, dtype=dtype, device=device)
    return {
        "forward": forward,
        "fwd+bwd": seconds(lambda: torch.autograd.grad(run(t), leaves, start), device),
    }


def time_all(
    sizes: list[Shape], dtypes: list[torch.dtype], device: torch.device, roofs: tuple[float, float]
) -> list[Row]:
    """Time every shape, dtype and candidate. Those that run out of memory are skipped with a message."""
    rows: list[Row] = []
    columns = ("shape", "Bt, D, H×W", "dtype", "run", "pass", "ms", "GB/s", "of the roof", "ours is")
    table = Table(*columns, title="Times")
    for dtype in dtypes:
        for shape in sizes:
            ours: dict[str, float] = {}
            for name, candidate in candidates(shape).items():
                try:
                    times = time_run(candidate, shape, dtype, device)
                except torch.OutOfMemoryError:
                    console.print(f"{shape.name}, {dtype}, {name}: out of memory")
                    continue
                ours = ours or times
                for which, took in times.items():
                    backward = which != "forward"
                    traffic = shape.traffic(dtype.itemsize, backward)
                    roof = max(traffic / roofs[0], shape.exponentials(backward) / roofs[1])
                    size = f"{shape.batch}, {shape.channels}, {shape.height}×{shape.width}"
                    figures = (f"{took * 1e3:.3f}", f"{traffic / took / 1e9:.0f}", f"{roof / took:.0%}")
                    table.add_row(shape.name, size, str(dtype)[6:], name, which, *figures, f"{took / ours[which]:.2f}×")
                    row = {"shape": shape.name, "size": size, "dtype": str(dtype), "run": name, "pass": which}
                    rows.append(row | {"seconds": took, "bytes": traffic, "roof_seconds": roof})
    console.print(table)
    return rows


def write_tuned(device: torch.device) -> None:
    """Time launch configurations and rewrite the table entries of this GPU architecture, except in a smoke test."""
    arch = tuning.architecture(device)
    found = tune.tune(device, SMOKE)
    for kernel, classes in found.items():
        for name, launch in classes.items():
            console.print(f"{arch} {kernel} {name}: {launch}")
    for chunk, took in tune.compare_chunks(device, SMOKE).items():
        console.print(f"chunk {chunk} (tuning.CHUNK is {tuning.CHUNK}): backward {took * 1e3:.3f} ms")
    if not SMOKE:
        everything = dict(tuning.table())
        tune.write_table(everything | {arch: everything.get(arch, {}) | found})
        console.print(f"written to {tuning.TABLE}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=32, help="images per batch for the ViM2 shapes")
    parser.add_argument("--model-batch", type=int, default=128, help="images per batch for the training rates")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file as JSON")
    parser.add_argument("--no-models", action="store_true", help="time the scan only")
    parser.add_argument("--tune", action="store_true", help="time launch configurations and write the table")
    parser.add_argument("--smoke", action="store_true", help="use tiny sizes on the CPU, under Triton's interpreter")
    args = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        print("benchmarks/scan_gpu.py needs an NVIDIA GPU, but torch finds none. Use --smoke to check that it runs")
        return 2
    device = torch.device("cpu" if SMOKE else "cuda")
    about = machine(device)
    for key, value in about.items():
        console.print(f"{key}: {value}")
    if args.tune:
        write_tuned(device)
        return 0
    dtypes = [torch.float32] if SMOKE else [torch.bfloat16, torch.float32]
    checks, right = check(dtypes, device)
    roofs = (
        bandwidth(device, 2**16 if SMOKE else 2**30),
        exponentials(device, 2 if SMOKE else 4096, 4 if SMOKE else 2048),
    )
    console.print(f"copy: {roofs[0] / 1e9:.0f} GB/s   exp2: {roofs[1] / 1e9:.0f} G/s")
    times = time_all(SMOKE_SHAPES if SMOKE else shapes(args.batch), dtypes, device, roofs)
    trained = [] if args.no_models else models.measure(device, args.model_batch, SMOKE)
    for row in trained:
        console.print(f"{row['model']}, compiled={row['compiled']}: {row['images_per_s']:.1f} training images/s")
    if args.json:
        figures = {"machine": about, "bytes_per_s": roofs[0], "exp2_per_s": roofs[1]}
        args.json.write_text(
            json.dumps(figures | {"errors": checks, "times": times, "models": trained}, indent=1) + "\n"
        )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
