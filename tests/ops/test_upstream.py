"""The mapping of arguments to mamba-ssm and causal-conv1d, on stand-ins with their calling conventions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.ops import causal_conv1d, scan_backend, selective_scan, upstream
from mmtrain.ops.arguments import ScanInputs


def stub_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As upstream documents its function; computed with explicit sums over all earlier positions."""
    assert A.dtype == torch.float32
    for parameter in (D, delta_bias):
        assert parameter is None or parameter.dtype == torch.float32
    per_group = u.shape[1] // B.shape[1]
    step = delta if delta_bias is None else delta + delta_bias[None, :, None]
    step = F.softplus(step) if delta_softplus else step
    B, C = (t.repeat_interleave(per_group, dim=1) for t in (B, C))  # (Bt, D, N, L)
    sums = step.cumsum(-1)  # Σ Δ up to and with a position
    decay = torch.einsum("bdts,dn->bdtsn", sums[..., :, None] - sums[..., None, :], A).exp()
    decay = decay * torch.ones(u.shape[-1], u.shape[-1]).tril()[..., None]
    h = torch.einsum("bdtsn,bds,bdns->bdtn", decay, step * u, B)
    y = torch.einsum("bdtn,bdnt->bdt", h, C)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * F.silu(z)
    return (y, h[:, :, -1]) if return_last_state else y


def stub_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """As upstream documents its function."""
    assert activation in (None, "silu", "swish")
    assert weight.shape[1] in (2, 3, 4)
    width = weight.shape[1]
    out = sum(F.pad(x, (width - 1 - k, 0))[..., : x.shape[-1]] * weight[:, k, None] for k in range(width))
    assert isinstance(out, Tensor)
    out = out if bias is None else out + bias[:, None]
    return F.silu(out) if activation else out


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    upstream._load.cache_clear()
    yield
    upstream._load.cache_clear()


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both packages, as if installed with their kernels."""
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = stub_scan  # type: ignore[attr-defined]
    interface.selective_scan_cuda = ModuleType("selective_scan_cuda")  # type: ignore[attr-defined]
    conv = ModuleType("causal_conv1d")
    conv.causal_conv1d_fn = stub_conv  # type: ignore[attr-defined]
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv)


def tensors(groups: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 6, 9), "delta": (2, 6, 9), "A": (6, 3), "B": (2, groups, 3, 9), "C": (2, groups, 3, 9)}
    shapes |= {"D": (6,), "z": (2, 6, 9), "delta_bias": (6,)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return values | {"A": -values["A"].exp()}


@pytest.mark.usefixtures("stubs")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("full", [True, False])
def test_scan(reverse: bool, groups: int, full: bool) -> None:
    t = {
        name: v.requires_grad_() for name, v in tensors(groups).items() if full or name in ("u", "delta", "A", "B", "C")
    }
    arguments = [t.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out, last = upstream.selective_scan_upstream(ScanInputs(*arguments, True, reverse))
    with scan_backend("reference"):
        expected = selective_scan(**t, delta_softplus=True, reverse=reverse)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert last.dtype == torch.float32
    assert last.shape == (2, 6, 3)
    start = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for a, b in zip(
        torch.autograd.grad(out, list(t.values()), start),
        torch.autograd.grad(expected, list(t.values()), start),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    # the state after the last position walked: what C = the unit vectors would read there
    reader = t["B"].detach().clone().zero_()
    reader[:, :, 1] = 1.0
    with scan_backend("reference"):
        plain = {name: t[name] for name in ("u", "delta", "A", "B") if name in t}
        bias = t.get("delta_bias")
        read = selective_scan(**plain, C=reader, delta_bias=bias, delta_softplus=True, reverse=reverse)
    torch.testing.assert_close(last[..., 1], read[..., 0 if reverse else -1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("stubs")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("width", "silu", "with_bias"), [(2, True, True), (3, False, True), (4, True, False)])
def test_conv(reverse: bool, width: int, silu: bool, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 6, 9), (6, width), (6,)))
    out = upstream.causal_conv1d_upstream(x, weight, bias if with_bias else None, silu, reverse)
    with scan_backend("reference"):
        expected = causal_conv1d(x, weight, bias if with_bias else None, "silu" if silu else None, reverse)
    torch.testing.assert_close(out, expected)


@pytest.mark.usefixtures("stubs")
def test_obstacles() -> None:
    t = tensors()
    assert upstream.available() == (True, "")
    assert upstream.available("conv") == (True, "")
    scan = ScanInputs(t["u"], t["delta"], t["A"], t["B"], t["C"])
    u, with_state = scan.u, scan._replace(initial_state=torch.zeros(2, 6, 3))
    assert upstream._scan_limits(scan) is None
    assert "initial state" in (upstream._scan_limits(with_state) or "")
    assert "256 states" in (upstream._scan_limits(scan._replace(A=torch.zeros(6, 257))) or "")
    assert "A in float32" in (upstream._scan_limits(scan._replace(A=scan.A.to(torch.complex64))) or "")
    assert "float64" in (upstream._scan_limits(scan._replace(u=u.double())) or "")
    assert "one dtype" in (upstream._scan_limits(scan._replace(B=scan.B.half())) or "")
    assert "CUDA" in (upstream.obstacle(scan) or "")
    with pytest.raises(ValueError, match="initial state"):
        upstream.selective_scan_upstream(with_state)
    assert upstream._conv_limits(u, torch.zeros(6, 4)) is None
    assert "taps" in (upstream._conv_limits(u, torch.zeros(6, 5)) or "")
    assert "multiple of 8" in (upstream._conv_limits(torch.zeros(2, 9, 6).transpose(1, 2), torch.zeros(6, 4)) or "")
    assert "CUDA" in (upstream.conv_obstacle(u, torch.zeros(6, 4)) or "")


def test_absent_packages_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    t = tensors()
    for name in ("mamba_ssm", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    for which, package in (("scan", "mamba_ssm"), ("conv", "causal_conv1d")):
        ok, reason = upstream.available(which)
        assert not ok
        assert package in reason
    assert "mamba_ssm" in (upstream.obstacle(ScanInputs(t["u"], t["delta"], t["A"], t["B"], t["C"])) or "")
    assert "causal_conv1d" in (upstream.conv_obstacle(t["u"], torch.zeros(6, 4)) or "")
    with pytest.raises(RuntimeError, match="not available"):
        upstream.causal_conv1d_upstream(t["u"], torch.zeros(6, 4), None, True, False)


@pytest.mark.usefixtures("stubs")
def test_a_mamba_without_its_kernel_is_told() -> None:
    module = sys.modules["mamba_ssm.ops.selective_scan_interface"]
    module.selective_scan_cuda = None  # type: ignore[attr-defined]
    ok, reason = upstream.available()
    assert not ok
    assert "MAMBA_KEEP_CUDA_BUILD" in reason
