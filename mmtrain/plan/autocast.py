"""What autocast does on a GPU, done on the meta device, of which torch knows no autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmtrain.models.averaging import MixerStack

#: PyTorch, "Automatic Mixed Precision", Autocast Op Reference: those of its lists that the models and losses call.
NARROWED: frozenset[Callable[..., Any]] = frozenset({F.linear, F.conv1d, F.conv2d, torch.matmul, torch.mm, torch.bmm})
WIDENED_ON_CUDA: frozenset[Callable[..., Any]] = frozenset(
    {F.layer_norm, F.softplus, F.cross_entropy, F.mse_loss, F.l1_loss, torch.exp, torch.Tensor.cumsum, torch.Tensor.sum}
)


class MetaAutocast(TorchFunctionMode):
    """Casts the floating-point arguments of ``narrowed`` functions to ``dtype``, those of ``widened`` to float32.

    A weight is cast once a use, as autocast's cache does within one forward pass, so that the narrow copies which a
    backward pass keeps are counted.
    """

    def __init__(self, dtype: torch.dtype, widened: frozenset[Callable[..., Any]] = WIDENED_ON_CUDA) -> None:
        super().__init__()
        self.dtype, self.widened = dtype, widened

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = self.dtype if func in NARROWED else torch.float32 if func in self.widened else None
        if target is None:
            return func(*args, **(kwargs or {}))

        def cast(value: Any) -> Any:
            floats = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(target) if floats else value

        return func(*(cast(a) for a in args), **{key: cast(value) for key, value in (kwargs or {}).items()})


def meta_autocast(model: nn.Module, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """A context in which ``model``, on the meta device and for planning only, runs as under autocast to ``dtype``
    (None: float32).

    The residual stream is widened by hooks, since a :class:`MixerStack` on the meta device asks for no autocast; and
    each branch carries the mode with it, since a branch that is computed again in the backward pass is out of it.
    """
    if dtype is None:
        return nullcontext()
    mode = MetaAutocast(dtype)
    for stack in [module for module in model.modules() if isinstance(module, MixerStack)]:
        stack.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        stack._branch = _within(mode, stack._branch)  # type: ignore[method-assign, assignment]
    return mode


def _within(mode: MetaAutocast, branch: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    def run(stream: Tensor, i: int) -> Tensor:
        with mode:
            return branch(stream, i)

    return run
