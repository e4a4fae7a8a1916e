"""Registration of the custom operators: fake kernels, gradients and FLOP counts, and the FLOP rules of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils.flop_counter import register_flop_formula


def scan_flops(u: torch.Size, A: torch.Size) -> int:
    """Floating-point operations of one forward scan: 9·N + 1 an element of u (the count customary for Mamba)."""
    return prod(u) * (9 * A[-1] + 1)


def conv_flops(x: torch.Size, weight: torch.Size) -> int:
    """Floating-point operations of one forward convolution: 2·K an element of x."""
    return 2 * prod(x) * weight[1]


def no_flops(*args: Any, **kwargs: Any) -> int:
    """The count of an elementwise operator, as torch's counter takes it."""
    return 0


def register(
    operator: CustomOpDef,
    fake: Callable[..., Any],
    flops: Callable[..., int] = no_flops,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Give an operator its fake kernel, its FLOP rule and, with ``backward``, its gradient.

    Args:
        operator: what ``torch.library.custom_op`` returned.
        fake: outputs without values, of the operator's arguments.
        flops: floating-point operations, of the operator's arguments with shapes for tensors.
        setup_context, backward: as ``CustomOpDef.register_autograd`` takes them.
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
    """Register an operator and the operator of its gradient, which counts twice the FLOPs.

    ``backward`` takes the gradients of the outputs, the tensors, the states if there are any, and the settings.

    Args:
        tensors: how many tensors ``forward`` takes first; an absent one (None) gets no gradient.
        settings: how many arguments after them ``backward`` takes too.
        outputs: how many outputs have a gradient.
        states: whether ``forward`` returns after them tensors for ``backward``.
        materialize: whether the gradient of an output that nothing used is zeros; else it is None, unless it is the
            first one's.
        fake, fake_backward, flops: as for :func:`register`; ``flops`` of the forward operator.
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
