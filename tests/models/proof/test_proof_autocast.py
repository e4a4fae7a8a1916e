"""bfloat16 autocast: close to float32, while the recurrence and its parameters never leave float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmtrain.models import create_model, list_models
from mmtrain.models.mixers import ImageChannelMixer, ImageTokenMixer
from mmtrain.models.s6 import S6
from mmtrain.models.tsm2 import TimeMixer, VariateMixer
from proof.measures import gradients, norm_error, total_norm

# bfloat16 has 8 bits of mantissa: a relative rounding of 2^-9 = 0.2 % for each number, met by the two projections, the
# convolution, B, C and the gate. Independent roundings of that size add up to under 1 % of the norm of the output, and
# of all gradients together (measured: 0.6 to 0.7 %; nine mixers on a float32 stream no more than one).
TOGETHER = 0.015
# A single small parameter (a bias, the steps) sees fewer roundings average out: measured up to 2.7 % in a block.
BLOCK_PARAMETER = 0.05
# In a whole model the noise from above meets gradients that are nearly 0 (those of B, C and Δ at the start, and of a
# weight just before a norm): a quarter of their own norm, or a thousandth of all gradients'.
MODEL_PARAMETER, MODEL_FLOOR = 0.25, 1e-3

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vim2_nano": (lambda: create_model("vim2_nano", num_classes=10), (4, 3, 32, 32)),
    "tsm2": (lambda: create_model("tsm2", lookback=256, dropout=0.0), (4, 256, 7)),
    "image token mixer": (lambda: ImageTokenMixer(32), (2, 12, 12, 32)),
    "image channel mixer": (lambda: ImageChannelMixer(32), (2, 14, 14, 32)),
    "time mixer": (lambda: TimeMixer(32), (2, 5, 40, 32)),
    "variate mixer": (lambda: VariateMixer(32, bidirectional=True), (2, 21, 10, 32)),
}


class Autocast(nn.Module):
    """A module run under bfloat16 autocast, its parameters known by their own names."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = [inner]
        self.named_parameters = inner.named_parameters  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner[0](x)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_stays_close_to_float32(name: str) -> None:
    build, shape = CASES[name]
    module = build()
    x = torch.randn(shape)
    weight = torch.randn(module(x).shape)
    exact, rough = gradients(module, x, weight), gradients(Autocast(module), x, weight)
    assert rough.keys() == exact.keys()
    whole = total_norm(exact)
    assert not torch.equal(rough["out"], exact["out"]), "autocast did nothing"
    assert norm_error(rough["out"], exact["out"]) < TOGETHER
    assert total_norm({key: rough[key] - exact[key] for key in exact}) < TOGETHER * whole
    relative, floor = (MODEL_PARAMETER, MODEL_FLOOR) if name in list_models() else (BLOCK_PARAMETER, 0.0)
    for key, value in exact.items():
        noise = (rough[key] - value).norm().item()
        assert noise <= relative * value.norm().item() + floor * whole, f"{key}: {noise:.3g} of {value.norm():.3g}"
        if key != "out":  # the gradient has the dtype of its parameter, for the optimizer's sake
            assert rough[key].dtype == torch.float32, key


class ScanInputs(TorchDispatchMode):
    """Keeps the tensors that go into and come out of mmtrain's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("mmtrain."):
            self.calls.append((name.split(".")[1], list(args), list(out) if isinstance(out, tuple) else [out]))
        return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["vim2_nano", "tsm2"])
def test_the_recurrence_stays_in_float32(name: str, dtype: torch.dtype) -> None:
    """At the operators themselves: Δ's bias, A = -exp(A_log), D and the saved states are float32 and not rounded."""
    model = create_model(name, **({"num_classes": 4} if name == "vim2_nano" else {"lookback": 600, "dropout": 0.0}))
    x = torch.randn(2, 3, 32, 32) if name == "vim2_nano" else torch.randn(2, 600, 3)
    with ScanInputs() as seen:
        with torch.autocast("cpu", dtype):
            loss = model(x).float().square().mean()
        loss.backward()
    forward = [(args, out) for op, args, out in seen.calls if op == "selective_mix_fwd"]
    backward = [(args, out) for op, args, out in seen.calls if op == "selective_mix_bwd"]
    ssms = iter([module for module in model.modules() if isinstance(module, S6)])
    assert len(forward) == len(backward)
    for args, out in forward:  # the activations may be narrow, the parameters and the states may not
        assert {t.dtype for t in [*args[1:], *out[1:]] if isinstance(t, Tensor)} == {torch.float32}
    for args, out in backward:
        assert {t.dtype for t in [*args[2:], *out[1:]] if isinstance(t, Tensor)} == {torch.float32}
    # modules run in the order in which they are registered, those of one mixer together
    for args, (_, states) in forward:
        for bias, A, D in zip(*args[5:8], strict=True):
            module = next(ssms)
            assert torch.equal(A, -torch.exp(module.A_log))
            assert torch.equal(D, module.D)
            assert torch.equal(bias, module.dt_proj.bias)
        if states.numel():
            # numbers that bfloat16 could hold would show a state kept in it
            assert not torch.equal(states, states.to(dtype).float())
    assert not list(ssms)
    assert any(states.numel() for _, (_, states) in forward)
    for module in [module for module in model.modules() if isinstance(module, S6)]:
        for parameter in (module.A_log, module.D, module.dt_proj.bias):
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
