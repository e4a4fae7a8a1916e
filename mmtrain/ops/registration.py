"""Register the custom operators with torch: fake kernels, gradients and FLOP counts."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula


def scan_flops(u: torch.Size, A: torch.Size) -> int:
    """Return the floating-point operations of a forward scan: 9N + 1 per element of u, as usual for Mamba."""
    return prod(u) * (9 * A[-1] + 1)


def conv_flops(x: torch.Size, weight: torch.Size) -> int:
    """Return the floating-point operations of a forward convolution: 2K per element of x."""
    return 2 * prod(x) * weight[1]


def no_flops(*args: Any, **kwargs: Any) -> int:
    """Return 0, the FLOP count of an elementwise operator in torch's counter."""
    return 0


def register(
    operator: CustomOpDef,
    fake: Callable[..., Any],
    flops: Callable[..., int] = no_flops,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Register the fake kernel, the FLOP count and, if ``backward`` is given, the gradient of an operator.

    Args:
        operator: the result of ``torch.library.custom_op``.
        fake: returns empty outputs for the arguments of the operator.
        flops: returns the floating-point operations for the arguments of the operator, with shapes in place of tensors.
        setup_context, backward: passed to ``CustomOpDef.register_autograd``.
    """
    operator.register_fake(fake)
    if backward is not None:
        operator.register_autograd(backward, setup_context=setup_context)
    register_flop_formula(operator._opoverload.overloadpacket)(flops)


def register_pair(
    forward: CustomOpDef,
    backward: CustomOpDef,
    *,
    tensors: int,
    settings: int,
    outputs: int = 1,
    states: bool = False,
    materialize: bool = True,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    flops: Callable[..., int],
) -> None:
    """Register a forward operator and its backward operator, which has twice the FLOPs.

    The arguments of ``backward`` are the gradients of the outputs, the tensors and the saved states of ``forward``, and
    its settings.

    Args:
        tensors: number of tensors at the beginning of the arguments of ``forward``. Those that are None get no
            gradient.
        settings: number of arguments after the tensors that are also passed to ``backward``.
        outputs: number of outputs that have a gradient.
        states: ``forward`` returns further tensors, which are saved for ``backward``.
        materialize: pass zeros as the gradient of an unused output. Otherwise pass None, except for the first output.
        fake, fake_backward, flops: as for :func:`register`; ``flops`` is that of the forward operator.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = output[outputs:] if states else ()
        if states:
            ctx.mark_non_differentiable(*kept)
        if not materialize:
            ctx.set_materialize_grads(False)
            ctx.shape = output[0].shape
        ctx.save_for_backward(*inputs[:tensors], *kept)
        ctx.settings, ctx.others = inputs[tensors : tensors + settings], len(inputs) - tensors

    def gradients(ctx: Any, *douts: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if douts[0] is None:
            douts = (saved[0].new_zeros(ctx.shape), *douts[1:])
        grads = backward(*douts[:outputs], *saved, *ctx.settings)
        given = [None if t is None else grad for t, grad in zip(saved[:tensors], grads, strict=True)]
        return (*given, *[None] * ctx.others)

    register(forward, fake, flops, setup_context, gradients)
    register(backward, fake_backward, lambda *args, **kwargs: 2 * flops(*args[outputs:], **kwargs))
