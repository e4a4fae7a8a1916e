"""The Triton scan: what the interpreter shows on a CPU (`interpreted_scan.py`), and the launch table."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from triton_cases import run_interpreted

pytest.importorskip("triton", reason="Triton is not installed here (it is for Linux only)")


@pytest.mark.slow
def test_scan_kernels_under_the_interpreter() -> None:
    run_interpreted("interpreted_scan.py")


@pytest.mark.slow
def test_the_package_does_not_import_triton() -> None:
    code = """
import sys, mmtrain.ops, mmtrain.ops.triton
assert not any(name.startswith("mmtrain.ops.triton.") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_entry_of_the_launch_table_is_usable() -> None:
    from mmtrain.ops.triton import tuning

    for arch, kernels in tuning.table().items():
        for kernel, classes in kernels.items():
            for name, launch in classes.items():
                where = f"{arch} {kernel} {name}"
                assert launch.warps in (1, 2, 4, 8), where
                assert launch.block_d & (launch.block_d - 1) == 0, where
                assert launch.unroll & (launch.unroll - 1) == 0, where
                assert tuning.CHUNK % launch.unroll == 0, where
                if kernel == "scan_backward":
                    assert launch.unroll <= 4, where
    for state, name in ((1, "1"), (3, "4"), (16, "16"), (17, "64"), (256, "256")):
        assert tuning.state_class(state) == name
        for kernel in ("scan_forward", "scan_forward_few", "scan_backward"):
            tuning.lookup(kernel, name, "sm_90")
    with pytest.raises(ValueError, match="256"):
        tuning.state_class(257)


def test_overrides_end() -> None:
    from mmtrain.ops.triton import tuning
    from mmtrain.ops.triton.tuning import Launch

    before = tuning.lookup("scan_forward", "16", "sm_90")
    with tuning.override({"scan_forward": Launch(2, 1)}, chunk=8):
        assert tuning.lookup("scan_forward", "16", "sm_90") == Launch(2, 1)
        assert tuning.chunk() == 8
    assert tuning.lookup("scan_forward", "16", "sm_90") == before
    assert tuning.chunk() == tuning.CHUNK


def test_the_batch_is_cut_to_the_buffer() -> None:
    from mmtrain.ops.triton.scan_launch import BUFFER_BYTES, batch_slices

    assert batch_slices(5, 0) == [slice(0, 5)]
    assert batch_slices(5, BUFFER_BYTES // 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert batch_slices(2, 10 * BUFFER_BYTES) == [slice(0, 1), slice(1, 2)]


def test_splits_are_multiples_of_the_chunk() -> None:
    from mmtrain.ops.triton import tuning
    from mmtrain.ops.triton.scan_launch import Problem, plan_split

    problem = Problem(1, 1, 64, 16, 1, 65536, (0,), True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "multiprocessors", lambda device: 132)
        split = plan_split(problem, 8, 1, torch.device("cuda"))
        assert split.length % tuning.CHUNK == 0
        assert (split.count - 1) * split.length < problem.length <= split.count * split.length
        assert 66 < split.count <= 132
        assert plan_split(problem, 2000, 1, torch.device("cuda")).count == 1
