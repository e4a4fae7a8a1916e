"""``selective_scan``, the S6 recurrence on any device: argument checks, choice of the backend, gate."""

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
MOST_STATES = 256  # limit of the Triton kernel


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
        shapes = f"B has shape {tuple(B.shape)}, C has shape {tuple(C.shape)}"
        raise UserError(f"{OP}: {shapes}: their numbers of groups must be equal")
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

    For each channel with a state h of size N, and Δ = delta + delta_bias (or its softplus),

        h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t
        y_t = (C_t·h_t + D u_t) silu(z_t)

    The arguments are those of ``selective_scan_fn`` in mamba_ssm, plus ``reverse`` and ``initial_state``.

    Args:
        u: (Bt, D, L) input: float32, bfloat16, float16 or float64. Any strides are accepted without a copy. Contiguous
            tensors and transposed views of contiguous (Bt, L, D) tensors are fastest.
        delta: (Bt, D, L) step size before bias and softplus, any strides.
        A: (D, N) real; negative for a stable recurrence.
        B, C: (Bt, N, L), or (Bt, G, N, L) where G divides D. The channels of a group share B and C.
        D: (D,) weight of the direct path from u to y; None: no direct path.
        z: (Bt, D, L) gate; None: no gate.
        delta_bias: (D,).
        delta_softplus: apply softplus to Δ.
        reverse: run from the last position to the first. Equivalent to flipping inputs and output along L.
        initial_state: (Bt, D, N) state before the first position of the recurrence; None: zeros.
        return_last_state: also return the state after the last position of the recurrence.

    Returns:
        y, (Bt, D, L) with the dtype and memory layout of u. With ``return_last_state`` the pair of y and the last
        state, (Bt, D, N). States and sums are float32 (float64 for float64 inputs). Results and gradients of the
        kernels do not depend on the number of threads; gradients have the layout of their inputs.

    Raises:
        UserError: if a shape, dtype or device does not fit (the message names the argument), or if the requested
            backend cannot run.
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
    # The C++ kernel reads and writes bfloat16. With a gate, float32 is used: the output is rounded after the gate.
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
    """Run mamba-ssm if it is selected and supports these inputs, else the Triton kernel (imported at first use)."""
    if chosen == "mamba_ssm":
        obstacle = upstream.obstacle(inputs)
        if obstacle is None:
            return upstream.selective_scan_upstream(inputs)
        backend.log_triton_instead(OP, obstacle)
    states = inputs.A.shape[1]
    if states > MOST_STATES:
        raise UserError(
            f"{OP}: A has state size {states}; the Triton kernel supports at most {MOST_STATES}. Use a smaller state"
            " size"
        )
    from mmtrain.ops.triton.api import selective_scan_triton

    return selective_scan_triton(inputs)
