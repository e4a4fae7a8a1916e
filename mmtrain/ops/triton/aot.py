"""Compile every kernel for given GPU architectures without a GPU, and report registers, shared memory and spills.

    python -m mmtrain.ops.triton.aot [--arch 80 90 100] [--dtype fp32 bf16 fp16] [--only KERNEL] [--json FILE]

Prints a table. The exit status is 1 if a kernel does not compile or spills registers to memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from mmtrain.ops.triton import tuning
from mmtrain.ops.triton.conv_kernels import conv_backward, conv_forward, gate_backward, merge_directions
from mmtrain.ops.triton.scan_backward_kernels import scan_backward
from mmtrain.ops.triton.scan_kernels import scan_forward, split_carry, split_local
from mmtrain.ops.triton.scan_launch import MERGE_BLOCK, scan_constants

ARCHITECTURES = (80, 90, 100)
DTYPES = ("fp32", "bf16", "fp16")
STATES = (1, 16, 64)
# Kernel arguments with the dtype of the inputs. All other pointers are float32.
INPUTS = {"u", "delta", "B", "C", "y", "dy", "value", "row", "du", "ddelta", "z", "out", "dout", "dz", "x", "dx"}
POINTERS = INPUTS | {
    *("A", "skip", "bias", "initial", "states", "last", "incoming", "scratch", "dA", "dBC", "dskip", "dbias"),
    *("dinitial", "ends", "steps", "parts", "total", "dtotal", "weight", "dweight"),
}
# Integer arguments that are multiples of 16 for real models. Triton then generates wide memory accesses.
DIVISIBLE = re.compile(r".*_[bkgt]|channels|dim|length|size")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """A kernel with one set of compile-time constants."""

    kernel: str
    function: JITFunction[Any]
    dtype: str
    variant: str
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Usage:
    """The resources of a compiled kernel.

    Attributes:
        registers: per thread.
        shared: bytes of shared memory.
        spill: bytes of stack per thread, which contains spilled registers.
    """

    kernel: str
    dtype: str
    variant: str
    arch: str
    warps: int
    registers: int
    shared: int
    spill: int


def cases(arch: str, dtypes: tuple[str, ...] = DTYPES, states: tuple[int, ...] = STATES) -> Iterator[Case]:
    """Yield all kernels with their launch configurations for an architecture and with all optional arguments."""
    for dtype in dtypes:
        for state in states:
            name = tuning.state_class(state)
            for kernel in ("scan_forward", "scan_forward_few"):
                launch = tuning.lookup(kernel, name, arch)
                names = ("SOFTPLUS", "HAS_SKIP", "HAS_BIAS", "HAS_INITIAL", "SAVE", "SAVE_LAST")
                constants = scan_constants(state, launch) | dict.fromkeys(names, True) | {"CHUNK": tuning.CHUNK}
                yield Case(kernel, scan_forward, dtype, f"N={state}", constants, launch.options())
            launch = tuning.lookup("scan_forward", name, arch)
            for backward in (False, True):
                flags = {"SOFTPLUS": True, "HAS_BIAS": True, "BACKWARD": backward}
                constants = scan_constants(state, launch) | flags
                variant = f"N={state} {'backward' if backward else 'forward'}"
                yield Case("split_local", split_local, dtype, variant, constants, launch.options())
            launch = tuning.lookup("scan_backward", name, arch)
            for extra in (False, True):
                flags = dict.fromkeys(("SOFTPLUS", "HAS_SKIP", "HAS_BIAS"), True)
                flags |= dict.fromkeys(("HAS_INITIAL", "HAS_INCOMING"), extra)
                constants = scan_constants(state, launch) | flags
                constants |= {"CHUNK": tuning.CHUNK, "TILE_T": 8, "FOLD": launch.fold}
                variant = f"N={state}{' with states' if extra else ''}"
                yield Case("scan_backward", scan_backward, dtype, variant, constants, launch.options())
        for directions in (1, 4):
            constants = {"DIRECTIONS": directions, "HAS_GATE": True, "SAVE": True, "BLOCK": MERGE_BLOCK}
            yield Case("merge_directions", merge_directions, dtype, f"K={directions}", constants, {"num_warps": 4})
        yield Case("gate_backward", gate_backward, dtype, "", {"BLOCK": MERGE_BLOCK}, {"num_warps": 4})
        for width in (4, 8):
            taps: dict[str, Any] = {"WIDTH": width, "HAS_BIAS": True, "SILU": True, "REVERSE": True}
            launch = tuning.lookup("conv_forward", "any", arch)
            constants = taps | {"BLOCK_T": launch.unroll, "BLOCK_D": launch.block_d}
            yield Case("conv_forward", conv_forward, dtype, f"W={width}", constants, launch.options())
            launch = tuning.lookup("conv_backward", "any", arch)
            constants = taps | {"UNROLL": launch.unroll, "BLOCK_D": launch.block_d}
            yield Case("conv_backward", conv_backward, dtype, f"W={width}", constants, launch.options())
    for backward in (False, True):
        constants = {"STATE": 16, "HAS_INITIAL": True, "BACKWARD": backward, "BLOCK": 128}
        yield Case(
            "split_carry", split_carry, "fp32", "backward" if backward else "forward", constants, {"num_warps": 4}
        )


def compile_case(case: Case, arch: int) -> Usage:
    """Compile a kernel for sm_``arch`` and return its resources.

    Raises:
        RuntimeError: if Triton runs as an interpreter, or if the resources cannot be determined.
    """
    function = case.function
    if not isinstance(function, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, so kernels are interpreted and cannot be compiled: unset it")
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for i, parameter in enumerate(function.params):
        name = parameter.name
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        pointer = name in POINTERS
        signature[name] = ("*" + (case.dtype if name in INPUTS else "fp32")) if pointer else "i32"
        if pointer or (DIVISIBLE.fullmatch(name) and not parameter.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, case.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    registers, stack = resource_usage(compiled.asm["cubin"])
    return Usage(
        case.kernel,
        case.dtype,
        case.variant,
        f"sm_{arch}",
        case.options["num_warps"],
        registers,
        compiled.metadata.shared,
        stack,
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return (registers per thread, bytes of stack per thread) of the kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(BINARIES / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if not found:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    return int(found[1]), int(found[2])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line of this module and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="compute capabilities (default: 80 90 100)"
    )
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--state", type=int, nargs="+", default=list(STATES), help="state sizes N")
    parser.add_argument("--only", metavar="KERNEL", help="only kernels whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to a JSON file")
    args = parser.parse_args(arguments)
    header = f"{'kernel':<18} {'dtype':<5} {'variant':<18} {'arch':<6} {'warps':>5} {'registers':>9} {'shared B':>8}"
    print(f"{header} {'spill B':>7}")
    usages: list[Usage] = []
    failed = False
    for arch in args.arch:
        for case in cases(f"sm_{arch}", tuple(args.dtype), tuple(args.state)):
            if args.only and args.only not in case.kernel:
                continue
            label = f"{case.kernel:<18} {case.dtype:<5} {case.variant:<18} sm_{arch:<3}"
            try:
                usage = compile_case(case, arch)
            except Exception as error:
                failed = True
                print(f"{label} FAILED: {type(error).__name__}: {error}")
                continue
            usages.append(usage)
            print(f"{label} {usage.warps:>5} {usage.registers:>9} {usage.shared:>8} {usage.spill:>7}", flush=True)
    spilling = [usage for usage in usages if usage.spill]
    print(f"{len(usages)} kernels compiled, {len(spilling)} spill registers")
    if args.json:
        args.json.write_text(json.dumps([asdict(usage) for usage in usages], indent=1) + "\n")
    return 1 if failed or spilling else 0


if __name__ == "__main__":
    sys.exit(main())
