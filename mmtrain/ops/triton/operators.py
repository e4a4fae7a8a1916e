"""The Triton kernels of the directional scan and the convolution as torch custom operators.

``mmtrain::directional_scan_fwd`` returns (out, last_state, states, total). ``states`` (Bt, K, ceil(L/chunk), D, N) and
``total`` (Bt, L, D), the sum over directions before the gate, are saved for the backward pass. Results that are not
requested and gradients of arguments that are None have no elements. Repeated runs are bit-identical. The arguments are
described in :mod:`mmtrain.ops.triton.api`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmtrain.ops.registration import conv_flops, register_pair, scan_flops
from mmtrain.ops.triton import tuning
from mmtrain.ops.triton.conv_kernels import conv_backward, conv_forward
from mmtrain.ops.triton.scan_launch import Problem, Tensors, batch_slices, merge, run_backward, run_forward, ungate
from mmtrain.ops.triton.tuning import minor, on_its_device, returned

SEGMENT = 128  # positions that a program of the convolution's backward kernel processes in sequence


# ---------------------------------------------------------------------------------------------------------- the scan

_SCAN = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? z, "
    "Tensor? initial_state"
)
_WALK = "bool delta_softplus, SymInt height, SymInt width, SymInt[] orders"


def _problem(u: Tensor, B: Tensor, softplus: bool, height: int, width: int, orders: list[int]) -> Problem:
    groups, state = B.shape[2], B.shape[3]
    return Problem(len(orders), groups, u.shape[2] // groups, state, height, width, tuple(orders), softplus)


def _scan_buffers(problem: Problem, tensors: tuple[Any, ...], save: bool, want_last: bool) -> tuple[Tensor, ...]:
    """Allocate (out (Bt, L, D) contiguous, last, states, total)."""
    u, delta, z = tensors[0], tensors[1], tensors[7]
    batch, directions, dim, length = delta.shape
    last = (batch, directions, dim, problem.state) if want_last else (0,)
    states = (batch, directions, problem.chunks() if save else 0, problem.dim, problem.state)
    return (
        u.new_empty(batch, length, dim),
        u.new_empty(last, dtype=torch.float32),
        u.new_empty(states, dtype=torch.float32),
        u.new_empty(batch if save and z is not None else 0, length, dim),
    )


def _scan_results(*inputs: Any) -> tuple[Tensor, ...]:
    u, B = inputs[0], inputs[3]
    out, *rest = _scan_buffers(_problem(u, B, *inputs[9:13]), inputs[:9], *inputs[13:])
    return returned(out, u), *rest


@torch.library.custom_op(
    "mmtrain::directional_scan_fwd",
    mutates_args=(),
    schema=f"({_SCAN}, {_WALK}, bool save, bool want_last) -> (Tensor, Tensor, Tensor, Tensor)",
)
def directional_scan_fwd(*inputs: Any) -> tuple[Tensor, ...]:
    """Return (out, last_state, states, total), see the docstring of this module."""
    u, delta, A, B, C, D, delta_bias, z, initial_state = inputs[:9]
    save, want_last = inputs[13:]
    problem = _problem(u, B, *inputs[9:13])
    out, last, states, total = _scan_buffers(problem, inputs[:9], save, want_last)
    if not u.numel():
        last.zero_()
        return returned(out, u), last, states, total
    batch, directions, dim, length = delta.shape
    ready = Tensors.of(u, delta, A, B, C, D, delta_bias, initial_state)
    z = None if z is None else minor(z)
    direct = directions == 1 and z is None
    # With several directions, their results are float32, so that only the sum is rounded to the dtype of u.
    part_dtype = u.dtype if directions == 1 else torch.float32
    for b in batch_slices(batch, 0 if direct else directions * length * dim * part_dtype.itemsize):
        if direct:
            parts = out[b][:, None]
        elif directions == 1 and save:
            parts = total[b][:, None]
        else:
            parts = u.new_empty(b.stop - b.start, directions, length, dim, dtype=part_dtype)
        run_forward(problem, ready.part(b), parts, states[b] if save else None, last[b] if want_last else None)
        if not direct:
            keep = total[b] if save and z is not None and directions > 1 else None
            merge(parts, None if z is None else z[b], keep, out[b])
    return returned(out, u), last, states, total


def _scan_gradients(dout: Tensor, dlast: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    """Allocate the gradients in the dtypes of the arguments, with channels (of dB, dC: states) adjacent in memory."""
    tensors = inputs[:9]
    made = [tensors[0].new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors]
    for i in (0, 1, 3, 4, 7):  # u, delta, B, C, z
        if tensors[i] is not None:
            made[i] = tensors[i].new_empty(tensors[i].mT.shape).mT
    return tuple(made)


@torch.library.custom_op(
    "mmtrain::directional_scan_bwd",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlast, {_SCAN}, Tensor states, Tensor total, {_WALK})"
    f" -> ({', '.join(['Tensor'] * 9)})",
)
def directional_scan_bwd(dout: Tensor, dlast: Tensor | None, *inputs: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the nine tensors. Those of sequences are channels-last."""
    tensors, (states, total), walk = inputs[:9], inputs[9:11], inputs[11:]
    u, delta, A, B, C, D, delta_bias, z, initial_state = tensors
    if not u.numel():
        return tuple(grad.zero_() for grad in _scan_gradients(dout, dlast, *inputs))
    if not states.numel() or (z is not None and not total.numel()):  # the forward pass saved no states: recompute them
        _, _, states, total = directional_scan_fwd(*tensors, *walk, True, False)
    problem = _problem(u, B, *walk)
    batch, directions, dim, length = delta.shape
    dy, dz = minor(dout), u.new_empty(0)
    if z is not None:
        dtotal, dz = u.new_empty(batch, length, dim, dtype=torch.float32), z.new_empty(batch, length, dim)
        ungate(dy, total, minor(z), dtotal, dz)
        dy, dz = dtotal.mT, dz.mT
    dy = dy[:, None]
    ready = Tensors.of(u, delta, A, B, C, D, delta_bias, initial_state)
    dlast = None if dlast is None else dlast.float().contiguous()
    dinitial = None if ready.initial is None else torch.empty_like(ready.initial)
    shared = u.shape[1] < directions
    du = u.new_empty(batch, u.shape[1], length, dim)
    ddelta = delta.new_empty(batch, directions, length, dim)
    dB, dC = (t.new_empty(*t.shape[:3], length, problem.state) for t in (B, C))
    sums: list[Tensor | None] = []  # dA, dD and dbias, summed over the slices of the batch
    # Buffers: partial sums of dB and dC for each block of at least 32 channels, and du per direction if u is shared.
    bytes_per_entry = directions * length * 4 * (problem.state * dim // 16 + dim * shared)
    for b in batch_slices(batch, bytes_per_entry):
        parts = u.new_empty(b.stop - b.start, directions, length, dim, dtype=torch.float32) if shared else du[b]
        dBC, *found = run_backward(
            problem,
            dy[b],
            ready.part(b),
            states[b],
            None if dlast is None else dlast[b],
            parts,
            ddelta[b],
            None if dinitial is None else dinitial[b],
        )
        if shared:
            merge(parts, None, None, du[b][:, 0])
        dB[b].copy_(dBC[..., 0, :])
        dC[b].copy_(dBC[..., 1, :])
        sums = [None if x is None or y is None else x + y for x, y in zip(sums, found, strict=True)] if sums else found
    dA, dD, dbias, dinitial = (
        u.new_empty(0) if t is None or grad is None else grad.to(t.dtype)
        for t, grad in zip((A, D, delta_bias, initial_state), (*sums, dinitial), strict=True)
    )
    return du.mT, ddelta.mT, dA, dB.mT, dC.mT, dD, dbias, dz, dinitial


register_pair(
    directional_scan_fwd,
    directional_scan_bwd,
    tensors=9,
    settings=4,
    outputs=2,
    states=True,
    materialize=False,
    fake=_scan_results,
    fake_backward=_scan_gradients,
    flops=lambda u, delta, A, *rest, **_: scan_flops(delta, A),
)


# --------------------------------------------------------------------------------------------------- the convolution


@torch.library.custom_op("mmtrain::causal_conv1d_triton_fwd", mutates_args=())
@on_its_device
def causal_conv1d_triton_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool) -> Tensor:
    """Return the convolution (Bt, D, L) with the dtype and layout of x. weight is (D, W) with W <= 8."""
    batch, dim, length = x.shape
    width = weight.shape[1]
    out = x.new_empty(batch, length, dim)
    if x.numel():
        x_in, weight = minor(x), weight.contiguous()
        launch = tuning.limit_channels(tuning.lookup("conv_forward", "any", tuning.architecture(x.device)), dim)
        programs = -(-dim // launch.block_d) * -(-length // launch.unroll) * batch
        conv_forward[(programs,)](
            x_in,
            weight,
            weight if bias is None else bias.contiguous(),
            out,
            x_in.stride(0),
            x_in.stride(2),
            length,
            dim,
            WIDTH=width,
            HAS_BIAS=bias is not None,
            SILU=silu,
            REVERSE=reverse,
            BLOCK_T=launch.unroll,
            BLOCK_D=launch.block_d,
            **launch.options(),
        )
    return returned(out, x)


def _conv_gradients(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    dx = x.new_empty(x.shape[0], x.shape[2], x.shape[1]).mT
    return dx, weight.new_empty(weight.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


@torch.library.custom_op("mmtrain::causal_conv1d_triton_bwd", mutates_args=())
@on_its_device
def causal_conv1d_triton_bwd(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (dx, dweight, dbias). dx is channels-last."""
    batch, dim, length = x.shape
    width = weight.shape[1]
    dx = x.new_empty(batch, length, dim)
    if not x.numel():
        return dx.mT, torch.zeros_like(weight), x.new_zeros(0 if bias is None else dim)
    x_in, dout, dense_weight = minor(x), minor(dout), weight.contiguous()
    launch = tuning.limit_channels(tuning.lookup("conv_backward", "any", tuning.architecture(x.device)), dim)
    blocks = -(-dim // launch.block_d)
    segment = tuning.forced("segment") or SEGMENT
    pairs = batch * -(-length // segment)
    # Several segments per program, as far as the GPU stays busy: this reduces the number of partial sums of dweight.
    items = tuning.forced("batches") or max(
        1, pairs * blocks * launch.warps // (128 * tuning.multiprocessors(x.device))
    )
    parts = -(-pairs // items)
    dweight = x.new_empty(parts, dim, width, dtype=torch.float32)
    dbias = x.new_empty(parts, dim, dtype=torch.float32)
    conv_backward[(parts * blocks,)](
        dout,
        x_in,
        dense_weight,
        dense_weight if bias is None else bias.contiguous(),
        dx,
        dweight,
        dbias,
        dout.stride(0),
        dout.stride(2),
        x_in.stride(0),
        x_in.stride(2),
        batch,
        length,
        dim,
        segment,
        items,
        WIDTH=width,
        HAS_BIAS=bias is not None,
        SILU=silu,
        REVERSE=reverse,
        UNROLL=launch.unroll,
        BLOCK_D=launch.block_d,
        **launch.options(),
    )
    return (
        dx.transpose(1, 2),
        dweight.sum(0).to(weight.dtype),
        x.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype),
    )


register_pair(
    causal_conv1d_triton_fwd,
    causal_conv1d_triton_bwd,
    tensors=3,
    settings=2,
    fake=lambda x, *rest: returned(x.new_empty(x.shape[0], x.shape[2], x.shape[1]), x),
    fake_backward=_conv_gradients,
    flops=lambda x, weight, *rest, **_: conv_flops(x, weight),
)
