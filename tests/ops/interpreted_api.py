"""The public calls of the Triton kernels under the interpreter: every public call against the reference; run by
``test_triton_api.py``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import Direction, causal_conv1d, scan_backend, selective_mix, selective_scan
from mmtrain.ops.arguments import NAMES


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def decay(*shape: int) -> Tensor:
    return (-torch.rand(shape)).requires_grad_()


def assert_as_the_reference(call: Callable[[], Tensor | tuple[Tensor, ...]], leaves: list[Tensor]) -> None:
    results = []
    for backend in ("triton", "reference"):
        with scan_backend(backend):
            found = call()
        outputs = found if isinstance(found, tuple) else (found,)
        loss = sum((t.square().sum() for t in outputs), torch.zeros(()))
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    for i, (value, exact) in enumerate(zip(*results, strict=True)):
        # both in float32: twice the error that each may have
        assert (value - exact).abs().max() <= 4e-5 * exact.abs().max(), i
        assert value.dtype == exact.dtype


def test_a_scan_with_everything() -> None:
    u, delta, z, B, C = leaf(2, 5, 9), leaf(2, 5, 9), leaf(2, 5, 9), leaf(2, 3, 9), leaf(2, 3, 9)
    A, D, bias, initial = decay(5, 3), leaf(5), leaf(5), leaf(2, 5, 3)

    def call() -> tuple[Tensor, ...]:
        return selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D,
            z,
            bias,
            delta_softplus=True,
            reverse=True,
            initial_state=initial,
            return_last_state=True,
        )

    assert_as_the_reference(call, [u, delta, A, B, C, D, z, bias, initial])


def test_groups() -> None:
    u, delta, B, C, A = leaf(2, 6, 5), leaf(2, 6, 5), leaf(2, 3, 2, 5), leaf(2, 3, 2, 5), decay(6, 2)
    assert_as_the_reference(lambda: selective_scan(u, delta, A, B, C, delta_softplus=True), [u, delta, A, B, C])


def test_a_convolution() -> None:
    x, weight, bias = leaf(2, 5, 9), leaf(5, 4), leaf(5)
    assert_as_the_reference(lambda: causal_conv1d(x, weight, bias, "silu", reverse=True), [x, weight, bias])


def made_directions(orders: tuple[str, ...], taps: int) -> tuple[list[Direction], list[Tensor]]:
    """Directions of 5 channels, 3 states and rank 2, and their parameters."""
    leaves, directions = [], []
    for order in orders:
        parameters = {"x_proj": leaf(8, 5), "dt_proj": leaf(5, 2), "dt_bias": leaf(5), "A": decay(5, 3), "D": leaf(5)}
        if taps:
            parameters |= {"conv": leaf(5, taps), "conv_bias": leaf(5)}
        leaves += parameters.values()
        directions.append(Direction(**parameters, order=order))  # type: ignore[arg-type]
    return directions, leaves


@pytest.mark.parametrize("taps", [0, 2])
def test_a_cross_scan(taps: int) -> None:
    x = leaf(2, 2, 12, 5)
    directions, leaves = made_directions((*NAMES, NAMES[3]), taps)
    assert_as_the_reference(lambda: selective_mix(x, directions, height=4), [x, *leaves])


@pytest.mark.parametrize(("orders", "height", "taps"), [(NAMES, 3, 0), (NAMES[:2], 1, 3), (NAMES[1:2], 1, 0)])
@pytest.mark.parametrize("gated", [True, False])
def test_a_mixer(orders: tuple[str, ...], height: int, taps: int, gated: bool) -> None:
    x = leaf(2, 12, 10 if gated else 5)
    directions, leaves = made_directions(orders, taps)
    assert_as_the_reference(lambda: selective_mix(x, directions, gated, height), [x, *leaves])


def test_half_precision_in_and_out() -> None:
    tensors = [torch.randn(2, 5, 9).half(), torch.rand(2, 5, 9).half(), -torch.rand(5, 3), torch.randn(2, 3, 9).half()]
    with scan_backend("triton"):
        found = selective_scan(tensors[0], tensors[1], tensors[2], tensors[3], tensors[3])
    with scan_backend("reference"):
        exact = selective_scan(*(t.double() for t in (*tensors, tensors[3])))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3)


def test_what_the_kernels_cannot_do_is_refused() -> None:
    u = torch.randn(1, 2, 4)
    with scan_backend("triton"):
        with pytest.raises(UserError, match="A has state size 300; the Triton kernel supports at most 256"):
            selective_scan(u, u, -torch.rand(2, 300), torch.randn(1, 300, 4), torch.randn(1, 300, 4))
        with pytest.raises(UserError, match="weight has 9 taps; the Triton kernel supports at most 8"):
            causal_conv1d(u, torch.randn(2, 9))
        with pytest.raises(UserError, match="the triton backend was requested, but the kernels do not support float64"):
            causal_conv1d(u.double(), torch.randn(2, 4).double())
