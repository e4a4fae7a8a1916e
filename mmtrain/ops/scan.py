"""``selective_scan``: the S6 recurrence on any device. Checks, choice of the backend, gate."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.errors import UserError
from mmtrain.ops import backend, upstream
from mmtrain.ops.arguments import ScanInputs, check_floats, check_shape, layout_like, wants_gradients
from mmtrain.ops.cpu.operators import selective_scan_fwd
from mmtrain.ops.reference import selective_scan_parallel, selective_scan_reference

OP = "selective_scan"
MOST_STATES = 256  # of the Triton kernel


def _check(inputs: ScanInputs) -> None:
    u, delta, A, B, C, D, z, delta_bias, _, _, initial_state = inputs
    named = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    may_be_none = ("D", "z", "delta_bias", "initial_state")
    check_floats(OP, "u", named | {"initial_state": initial_state}, may_be_none)
    if u.dim() != 3 or u.shape[1] == 0 or u.shape[2] == 0:
        raise UserError(f"{OP}: u has shape {tuple(u.shape)}, expected (batch, channels, positions)")
    batch, channels, length = u.shape
    check_shape(OP, "delta", delta, (batch, channels, length), "the shape of u")
    if A.dim() != 2 or A.shape[0] != channels or A.shape[1] == 0:
        raise UserError(f"{OP}: A has shape {tuple(A.shape)}, expected (D, N) with D = {channels} and N >= 1")
    state = A.shape[1]
    for name, tensor in (("B", B), ("C", C)):
        if tensor.dim() == 3:
            check_shape(OP, name, tensor, (batch, state, length), "(batch, N, positions)")
        elif tensor.dim() == 4:
            groups = tensor.shape[1]
            check_shape(OP, name, tensor, (batch, groups, state, length), "(batch, groups, N, positions)")
            if groups == 0 or channels % groups:
                raise UserError(f"{OP}: {name} has {groups} groups, which do not divide the {channels} channels of u")
        else:
            raise UserError(f"{OP}: {name} has {tensor.dim()} dimensions, expected (batch, [groups,] N, positions)")
    if (B.shape[1] if B.dim() == 4 else 1) != (C.shape[1] if C.dim() == 4 else 1):
        raise UserError(f"{OP}: B has shape {tuple(B.shape)}, C {tuple(C.shape)}; the numbers of groups differ")
    for name, optional in (("D", D), ("delta_bias", delta_bias)):
        if optional is not None:
            check_shape(OP, name, optional, (channels,), "(D,)")
    if z is not None:
        check_shape(OP, "z", z, (batch, channels, length), "the shape of u")
    if initial_state is not None:
        check_shape(OP, "initial_state", initial_state, (batch, channels, state), "(batch, D, N)")


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: Literal[False] = False,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    *,
    return_last_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective state space recurrence (S6; MambaMixer, arXiv 2403.19888, section 2; Mamba, arXiv 2312.00752).

    Δ = delta + delta_bias, through softplus if ``delta_softplus``; then for every channel, with N states,
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = C_t·h_t + D u_t, times silu(z_t) if z is given.
    The meaning of the arguments is that of ``selective_scan_fn`` in mamba_ssm, plus ``reverse`` and ``initial_state``.

    Args:
        u: (Bt, D, L) input: float32, bfloat16, float16 or float64. A contiguous tensor and the transposed view of a
            contiguous (Bt, L, D) tensor are read in place; so is any other strided tensor, more slowly.
        delta: (Bt, D, L) step before bias and softplus, in any layout.
        A: (D, N) real; negative for a stable recurrence.
        B, C: (Bt, N, L), or (Bt, G, N, L) with G dividing D: channels of one group share B and C.
        D: (D,) weight of the direct path.
        z: (Bt, D, L) gate.
        delta_bias: (D,).
        delta_softplus: whether Δ passes through softplus.
        reverse: run from the last position to the first; equals flip, scan, flip along L.
        initial_state: (Bt, D, N), h before the first position (of the recurrence); zeros if not given.
        return_last_state: return also h after the last position, (Bt, D, N) in float32 (float64 if the input is).

    Returns:
        (Bt, D, L), dtype and memory layout of u; with ``return_last_state`` a pair of it and the state. State and sums
        are float32 (float64 if the input is). The kernel's gradients have the layout of their inputs, and like the
        output do not depend on the number of threads.

    Raises:
        UserError: shapes, dtypes or devices that do not fit, naming the argument; a backend that cannot run.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse, initial_state)
    _check(inputs)
    if B.dim() == 3 or C.dim() == 3:
        inputs = inputs._replace(B=B if B.dim() == 4 else B[:, None], C=C if C.dim() == 4 else C[:, None])
    float64 = u.dtype == torch.float64
    compute = torch.float64 if float64 else torch.float32
    chosen = backend.choose(u.device.type, float64)
    if chosen in backend.GPU_BACKENDS:
        out, last = _on_gpu(chosen, inputs)
        return (out, last) if return_last_state else out
    # the C++ kernel reads and writes bfloat16 itself; a gate needs the output before it is rounded
    inputs = inputs.to(compute, kept=backend.CPU_DTYPES if chosen == "cpu" and z is None else ())
    if chosen == "cpu":
        tensors = (*inputs[:6], inputs.delta_bias, inputs.initial_state)
        save = wants_gradients(*tensors)
        out, last, _ = selective_scan_fwd(*tensors, delta_softplus, reverse, save, return_last_state)
    else:
        out, last = (selective_scan_parallel if chosen == "parallel" else selective_scan_reference)(inputs)
        out = layout_like(out, u)
    if inputs.z is not None:
        out = out * F.silu(inputs.z)
    out = out.to(u.dtype)
    return (out, last) if return_last_state else out


def _on_gpu(chosen: str, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """By mamba-ssm if it is asked for and can, else by Triton, which the first call imports."""
    if chosen == "mamba_ssm":
        obstacle = upstream.obstacle(inputs)
        if obstacle is None:
            return upstream.selective_scan_upstream(inputs)
        backend.tell_triton_instead(OP, obstacle)
    states = inputs.A.shape[1]
    if states > MOST_STATES:
        raise UserError(f"{OP}: A has {states} states, the Triton kernel takes up to {MOST_STATES}")
    from mmtrain.ops.triton.api import selective_scan_triton

    return selective_scan_triton(inputs)
