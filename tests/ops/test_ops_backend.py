"""The choice of a backend: which backend runs, that it is told, and that bad arguments are named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from scan_cases import Case, inputs, run

from mmtrain.errors import UserError
from mmtrain.ops import (
    Direction,
    backend_report,
    causal_conv1d,
    keyed_dropout,
    scan_backend,
    selective_mix,
    selective_scan,
)
from mmtrain.ops.cpu import build


def small(**replaced: Any) -> dict[str, Any]:
    return {name: tensor.detach() for name, tensor in inputs(Case()).items()} | replaced


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"u": torch.zeros(2, 5)}, "u has shape"),
    ({"u": torch.zeros(2, 5, 0)}, "u has shape"),
    ({"u": torch.zeros(2, 5, 11, dtype=torch.int64)}, "u must have a real floating-point dtype"),
    ({"delta": torch.zeros(2, 5, 12)}, "delta has shape"),
    ({"delta": torch.zeros(2, 5, 11, dtype=torch.float64)}, "delta is torch.float64"),
    ({"A": torch.zeros(4, 3)}, "A has shape"),
    ({"A": torch.zeros(5, 3, dtype=torch.complex64)}, "A must have a real"),
    ({"B": torch.zeros(2, 4, 11)}, "B has shape"),
    ({"B": torch.zeros(2, 3, 3, 11)}, "B has 3 groups"),
    ({"B": torch.zeros(2, 5, 3, 11)}, "numbers of groups must be equal"),
    ({"C": torch.zeros(3)}, "C has 1 dimensions"),
    ({"C": torch.zeros(2, 3, 11, device="meta")}, "C is on meta"),
    ({"D": torch.zeros(4)}, "D has shape"),
    ({"z": torch.zeros(2, 5, 1)}, "z has shape"),
    ({"delta_bias": torch.zeros(1)}, "delta_bias has shape"),
    ({"delta_bias": 1.0}, "delta_bias must be a tensor"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_scan_names_the_wrong_argument(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        selective_scan(**small(**wrong))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(2, 5), torch.zeros(5, 4)), "x has shape"),
        ((torch.zeros(2, 5, 7), torch.zeros(4, 4)), "weight has shape"),
        ((torch.zeros(2, 5, 7), torch.zeros(5, 0)), "weight has shape"),
        ((torch.zeros(2, 5, 7), torch.zeros(5, 4), torch.zeros(4)), "bias has shape"),
        ((torch.zeros(2, 5, 7), torch.zeros(5, 4), None, "relu"), "activation='relu'"),
        ((torch.zeros(2, 5, 7), torch.zeros(5, 4).double()), "weight is torch.float64"),
    ],
)
def test_conv_names_the_wrong_argument(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        causal_conv1d(*args)


DIRECTION = Direction(torch.zeros(8, 11), torch.zeros(11, 2), torch.zeros(11), torch.zeros(11, 3), torch.zeros(11))


@pytest.mark.parametrize("name", ["reference", "parallel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 5])
def test_an_empty_batch_has_empty_results_and_gradients(
    fresh: None, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, groups: int
) -> None:
    monkeypatch.setenv("MMTRAIN_SCAN", name)
    u, delta = (torch.zeros(0, 5, 11, dtype=dtype, requires_grad=True) for _ in range(2))
    A, bc = torch.ones(5, 3, dtype=dtype, requires_grad=True), torch.zeros(0, groups, 3, 11, dtype=dtype)
    out, last = selective_scan(
        u, delta, A, bc, bc, initial_state=torch.zeros(0, 5, 3, dtype=dtype), return_last_state=True
    )
    assert (out.shape, last.shape) == ((0, 5, 11), (0, 5, 3))
    (out.sum() + last.sum()).backward()
    assert A.grad is not None
    assert not A.grad.any()
    x = torch.zeros(0, 11, 11, dtype=dtype)
    assert selective_mix(x, [Direction(*(None if t is None else t.to(dtype) for t in DIRECTION[:5]))]).shape == x.shape
    assert causal_conv1d(x, torch.zeros(11, 4, dtype=dtype)).shape == x.shape
    assert keyed_dropout(x, torch.zeros(0, dtype=torch.int32), 0.5).shape == x.shape


def test_choice_is_told_once(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mmtrain"):
        for _ in range(3):
            selective_scan(**small())
    told = [record.message for record in caplog.records if "cpu backend" in record.message]
    assert len(told) == 1
    assert "threads" in told[0]


def test_environment_and_context_override(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def used() -> bool:
        """Whether the C++ operator is what autograd recorded."""
        node = selective_scan(**{n: t.requires_grad_() for n, t in small(z=None).items() if t is not None}).grad_fn
        return "selective_scan" in type(node).__name__

    assert used()
    monkeypatch.setenv("MMTRAIN_SCAN", "reference")
    assert not used()
    assert backend_report()["backend"] == "reference"
    with scan_backend("cpu"):
        assert used()
        with scan_backend("reference"):
            assert not used()
        assert used()
    monkeypatch.setenv("MMTRAIN_SCAN", "fast")
    with pytest.raises(UserError, match="MMTRAIN_SCAN='fast'"):
        used()
    with pytest.raises(UserError, match="did you mean 'reference'"), scan_backend("referense"):
        pass


def test_float64_takes_the_reference_and_says_so_once(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    doubles = {name: tensor.double() for name, tensor in small().items()}
    for _ in range(2):
        assert selective_scan(**doubles).dtype == torch.float64
    assert len([r for r in caplog.records if r.levelno == logging.WARNING and "float64" in r.message]) == 1
    with pytest.raises(UserError, match="float64"), scan_backend("cpu"):
        selective_scan(**doubles)


def test_without_a_compiler(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(length=40)
    expected = run(case, inputs(case))
    from mmtrain.ops.cpu import library

    library.load.cache_clear()
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("MMTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "INSTALLED", tmp_path / "missing.so")
    caplog.clear()
    found = run(case, inputs(case))
    run(case, inputs(case))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "no-such-compiler" in warnings[0]
    assert "apt-get install g++" in warnings[0]
    report = backend_report()
    assert (report["backend"], report["built"], report["library"]) == ("reference", "missing", "")
    assert report["cure"]
    with pytest.raises(UserError, match="no-such-compiler"), scan_backend("cpu"):
        selective_scan(**small())


def test_report_tells_what_runs(fresh: None) -> None:
    report = backend_report()
    assert report["backend"] == "cpu"
    assert Path(str(report["library"])).exists()
    assert report["isa"] in {"baseline", "avx2", "avx512"}
    assert report["threads"] == torch.get_num_threads()


def test_narrower_isa_by_environment(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMTRAIN_SCAN_ISA", "baseline")
    assert backend_report()["isa"] == "baseline"
    from mmtrain.ops.cpu import library

    library.load.cache_clear()
    monkeypatch.setenv("MMTRAIN_SCAN_ISA", "avx1024")
    with pytest.raises(UserError, match="MMTRAIN_SCAN_ISA='avx1024'"):
        backend_report()
