"""Every kernel compiles to machine code for the GPUs we mean, without spilling registers; no GPU is needed."""

from __future__ import annotations

import dataclasses
import os

import pytest

pytest.importorskip("triton", reason="Triton is not installed here (it is for Linux only)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: kernels cannot be compiled", allow_module_level=True)

from mmtrain.ops.triton import aot

ALL = ["scan_forward", "scan_backward", "split_local", "split_carry", "merge_directions", "gate_backward", "conv"]


def compiled(arch: int, dtype: str, kernel: str, states: tuple[int, ...]) -> list[aot.Usage]:
    wanted = [case for case in aot.cases(f"sm_{arch}", (dtype,), states) if kernel in case.kernel]
    return [aot.compile_case(case, arch) for case in wanted]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ALL)
def test_compiles_for_an_h100_without_spilling(kernel: str) -> None:
    usages = compiled(90, "bf16", kernel, (16,))
    assert usages
    for usage in usages:
        assert usage.spill == 0, usage
        assert 0 < usage.registers <= 255


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
@pytest.mark.parametrize("dtype", aot.DTYPES)
def test_the_scan_compiles_for_every_architecture_and_dtype(arch: int, dtype: str) -> None:
    for kernel in ("scan_forward", "scan_backward"):
        for usage in compiled(arch, dtype, kernel, (16,)):
            assert usage.spill == 0, usage


@pytest.mark.slow
@pytest.mark.parametrize("sequence", [True, False])
def test_compiles_where_sizes_are_one(sequence: bool) -> None:
    """Triton takes integer arguments of 1 as compile-time constants, which other code paths must stand."""
    ones = {"groups", "splits", "batches", "batch", "directions", "height", "u_k", "items"}
    ones |= set() if sequence else {"width", "length", "channels", "dim", "segment"}
    for case in aot.cases("sm_90", ("bf16",), (16,)):
        names = [p.name for p in case.function.params if p.name in ones and not p.do_not_specialize]
        constants = case.constants | dict.fromkeys(names, 1)
        assert aot.compile_case(dataclasses.replace(case, constants=constants), 90).registers > 0


def test_an_interpreted_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(aot.cases("sm_90", ("fp32",), (1,)))
    monkeypatch.setattr(aot, "JITFunction", int)  # as under TRITON_INTERPRET=1, where kernels are something else
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_case(case, 90)


def test_spills_are_told_and_end_in_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--arch", "90", "--dtype", "fp32", "--state", "1", "--only", "gate"]
    assert aot.main(command) == 0
    assert "1 kernels compiled, 0 spill registers" in capsys.readouterr().out
    monkeypatch.setattr(aot, "resource_usage", lambda cubin: (255, 16))
    assert aot.main(command) == 1
    assert "1 spill registers" in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_ends_in_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(cubin: bytes) -> tuple[int, int]:
        raise RuntimeError("no tool")

    monkeypatch.setattr(aot, "resource_usage", broken)
    assert aot.main(["--arch", "90", "--dtype", "fp32", "--state", "1", "--only", "gate"]) == 1
    assert "FAILED: RuntimeError: no tool" in capsys.readouterr().out
