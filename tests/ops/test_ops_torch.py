"""The operators inside torch: opcheck, compile, fake and meta tensors, checkpointing, FLOP counts."""

from __future__ import annotations

import pytest
import torch
from scan_cases import Case, inputs
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mmtrain.ops import causal_conv1d, selective_scan


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("save_states", [True, False])
def test_scan_opcheck(full: bool, save_states: bool) -> None:
    t = inputs(Case(length=70, channels_last=True, full=full))
    args = (t["u"], t["delta"], t["A"], t["B"][:, None], t["C"][:, None], t.get("D"), t.get("delta_bias"), None)
    result = torch.library.opcheck(
        torch.ops.mmtrain.selective_scan_fwd.default, (*args, True, True, save_states, False)
    )
    assert set(result.values()) == {"SUCCESS"}


def test_conv_opcheck() -> None:
    x = torch.randn(2, 70, 5).transpose(1, 2).requires_grad_()
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    for args in ((x, weight, bias, True, False), (x, weight, None, False, True)):
        result = torch.library.opcheck(torch.ops.mmtrain.causal_conv1d_fwd.default, args)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.slow
def test_compiles_into_one_graph() -> None:
    tensors = inputs(Case(length=70, channels_last=True))
    weight = torch.randn(5, 4, requires_grad=True)

    def block(weight: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        u = causal_conv1d(tensors.pop("u"), weight, activation="silu")
        return selective_scan(u, **tensors, delta_softplus=True, reverse=True)

    leaves = [weight, *tensors.values()]
    results = []
    for run in (block, torch.compile(block, fullgraph=True)):
        out = run(weight, **tensors)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert results[0][0].stride() == results[1][0].stride()


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    tensors = inputs(Case(length=150))
    leaves = list(tensors.values())

    def scan(*args: torch.Tensor) -> torch.Tensor:
        return selective_scan(**dict(zip(tensors, args, strict=True)), delta_softplus=True)

    plain = torch.autograd.grad(scan(*leaves).sum(), leaves)
    for a, b in zip(
        torch.autograd.grad(checkpoint(scan, *leaves, use_reentrant=False).sum(), leaves), plain, strict=True
    ):
        assert torch.equal(a, b)


def test_flops_are_counted_also_on_meta() -> None:
    case = Case(batch=2, channels=6, length=70, state=4)
    tensors = inputs(case)
    forward = 2 * 70 * 6 * (9 * 4 + 1)
    with FlopCounterMode(display=False) as counter:
        selective_scan(**tensors).sum().backward()
    assert counter.get_total_flops() == 3 * forward
    with FlopCounterMode(display=False) as counter:
        out = selective_scan(**{name: tensor.detach().to("meta") for name, tensor in tensors.items()})
    assert out.shape == (2, 6, 70)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        causal_conv1d(tensors["u"], torch.ones(6, 4)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 6 * 70 * 4
