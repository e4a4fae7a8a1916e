"""Launch the scan kernels: memory layouts, buffers and division of the work. Autograd is in ``operators``.

In the kernels, sequences are (Bt, K, L, D) with channels adjacent in memory, B and C are (Bt, K, G, L, N) with states
adjacent, and states are (Bt, K, ..., D, N). Channels-last tensors, which the models produce, are read in place. Other
tensors are copied once: a warp reads 32 channels of one position, and reading 32 separate cache lines would be slower
than the copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from mmtrain.ops.triton import tuning
from mmtrain.ops.triton.conv_kernels import gate_backward, merge_directions
from mmtrain.ops.triton.scan_backward_kernels import scan_backward
from mmtrain.ops.triton.scan_kernels import scan_forward, split_carry, split_local
from mmtrain.ops.triton.tuning import Launch, minor, on_its_device

BUFFER_BYTES = 512 * 2**20  # maximum size of the buffers for per-direction results; the batch is divided accordingly
MERGE_BLOCK = 1024


@dataclass(frozen=True)
class Problem:
    """The sizes and settings of a scan. ``channels`` is the number of channels in one group."""

    directions: int
    groups: int
    channels: int
    state: int
    height: int
    width: int
    orders: tuple[int, ...]
    softplus: bool

    @property
    def length(self) -> int:
        return self.height * self.width

    @property
    def dim(self) -> int:
        return self.groups * self.channels

    @property
    def packed_orders(self) -> int:
        return sum(order << 2 * k for k, order in enumerate(self.orders))

    def sizes(self) -> tuple[int, ...]:
        """Return the sizes as arguments of the kernels."""
        return self.directions, self.groups, self.channels, self.height, self.width, self.packed_orders

    def programs(self, launch: Launch, batch: int) -> int:
        """Return the number of programs: blocks of channels times groups, directions and batch entries."""
        return -(-self.channels // launch.block_d) * self.groups * self.directions * batch

    def chunks(self) -> int:
        return -(-self.length // tuning.chunk())


@dataclass(frozen=True)
class Split:
    """The division of a sequence into ``count`` splits of ``length`` positions, a multiple of the chunk length."""

    count: int
    length: int


def plan_split(problem: Problem, programs: int, warps: int, device: torch.device) -> Split:
    """Split the sequence only if fewer than four warps per multiprocessor would run: splitting costs another pass."""
    chunk = tuning.chunk()
    length = tuning.forced("split_length")
    if length is None:
        wanted = 8 * tuning.multiprocessors(device) // max(1, programs * warps)
        count = min(wanted, -(-problem.length // (4 * chunk))) if wanted > 2 else 1
        length = -(-problem.length // (max(count, 1) * chunk)) * chunk
    return Split(-(-problem.length // length), length)


def launch_of(kernel: str, problem: Problem, device: torch.device) -> Launch:
    """Return the launch configuration of a scan kernel from the table, limited to the existing channels."""
    entry = tuning.lookup(kernel, tuning.state_class(problem.state), tuning.architecture(device))
    return tuning.limit_channels(entry, problem.channels)


def plan_forward(problem: Problem, batch: int, device: torch.device) -> tuple[Launch, Split]:
    """Choose the launch configuration and the split of the forward kernel.

    If the normal configuration does not fill the GPU, use one with fewer channels per program (``scan_forward_few``).
    """
    launch = launch_of("scan_forward", problem, device)
    if problem.programs(launch, batch) * launch.warps < 8 * tuning.multiprocessors(device):
        launch = launch_of("scan_forward_few", problem, device)
    return launch, plan_split(problem, problem.programs(launch, batch), launch.warps, device)


def batch_slices(batch: int, bytes_per_entry: int) -> list[slice]:
    """Divide the batch into the fewest slices of equal size whose buffers fit in :data:`BUFFER_BYTES`."""
    pieces = min(batch, -(-batch * bytes_per_entry // BUFFER_BYTES))
    size = -(-batch // max(1, pieces))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _strides(tensor: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor (Bt, K or 1, ..., L), without that of the second-last dimension, which is 1.

    The stride of a dimension K of size 1, which all directions share, is 0.
    """
    batch, direction, *groups, _, position = tensor.stride()
    return batch, 0 if tensor.shape[1] == 1 else direction, *groups, position


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return ``other`` if ``tensor`` is None. The kernel needs a pointer, but does not read it."""
    return other if tensor is None else tensor


def scan_constants(state: int, launch: Launch) -> dict[str, int]:
    """Return the compile-time constants of a scan kernel for state size N and a launch configuration."""
    block_n = triton.next_power_of_2(state)
    return {"STATE": state, "BLOCK_N": block_n, "BLOCK_D": launch.block_d, "UNROLL": launch.unroll}


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class Tensors(NamedTuple):
    """The tensors of a scan in the layouts of the kernels.

    In u (Bt, 1 or K, D, L) and delta (Bt, K, D, L) channels are adjacent in memory, in B and C (Bt, K, G, N, L) states.
    A (K, D, N), skip and bias (K, D) and initial (Bt, K, D, N) are contiguous.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    skip: Tensor | None
    bias: Tensor | None
    initial: Tensor | None

    @classmethod
    def of(cls, *tensors: Tensor | None) -> Tensors:
        """Create it from tensors of any layout, which are copied if necessary."""
        u, delta, A, B, C, D, delta_bias, initial = tensors
        assert u is not None and delta is not None and A is not None and B is not None and C is not None  # noqa: PT018
        start = None if initial is None else initial.float().contiguous()
        return cls(minor(u), minor(delta), A.contiguous(), minor(B), minor(C), _dense(D), _dense(delta_bias), start)

    def part(self, b: slice) -> Tensors:
        """Return the tensors of a slice of the batch."""
        initial = None if self.initial is None else self.initial[b]
        return self._replace(u=self.u[b], delta=self.delta[b], B=self.B[b], C=self.C[b], initial=initial)

    def inputs(self) -> tuple[Tensor, ...]:
        """Return the first arguments of the forward and the backward kernel."""
        skip, bias = _or(self.skip, self.A), _or(self.bias, self.A)
        return self.u, self.delta, self.A, self.B, self.C, skip, bias

    def decay_strides(self) -> tuple[int, int, int]:
        """Return the strides of A: direction, state, channel."""
        return self.A.stride(0), self.A.stride(2), self.A.stride(1)

    def given(self) -> dict[str, bool]:
        """Return the compile-time constants that say which optional parameters exist."""
        return {"HAS_SKIP": self.skip is not None, "HAS_BIAS": self.bias is not None}


def split_starts(
    problem: Problem,
    split: Split,
    launch: Launch,
    t: Tensors,
    value: Tensor,
    rows: Tensor,
    initial: Tensor | None,
    backward: bool,
) -> Tensor:
    """Return the state at the start of every split, (Bt, K, splits, D, N) float32; backward: at the end.

    Args:
        value: the input of the recurrence: u; backward: dy.
        rows: the coefficients of the input: B; backward: C.
        initial: the state before the first split; backward: after the last.
    """
    delta, batch, dim, state = t.delta, t.delta.shape[0], problem.dim, problem.state
    ends = delta.new_empty(batch, problem.directions, split.count, dim, state, dtype=torch.float32)
    steps = delta.new_empty(ends.shape[:-1], dtype=torch.float32)
    tensors = (value, delta, t.A, rows, _or(t.bias, t.A), ends, steps)
    strides = (*_strides(value), *_strides(delta), *t.decay_strides(), *_strides(rows))
    split_local[(problem.programs(launch, batch) * split.count,)](
        *(*tensors, *strides, *problem.sizes(), split.count, split.length),
        SOFTPLUS=problem.softplus,
        HAS_BIAS=t.bias is not None,
        BACKWARD=backward,
        **scan_constants(state, launch),
        **launch.options(),
    )
    split_carry[(-(-state * dim // 128) * batch * problem.directions,)](
        *(ends, steps, t.A, _or(initial, ends), *t.decay_strides(), problem.directions, dim, split.count),
        STATE=state,
        HAS_INITIAL=initial is not None,
        BACKWARD=backward,
        BLOCK=128,
        num_warps=4,
    )
    return ends


@on_its_device
def run_forward(problem: Problem, t: Tensors, y: Tensor, states: Tensor | None, last: Tensor | None) -> None:
    """Run the forward kernel. Writes y (Bt, K, L, D), contiguous, and the states and last state if not None."""
    batch, starts = t.delta.shape[0], t.initial
    launch, split = plan_forward(problem, batch, t.delta.device)
    if split.count > 1:
        starts = split_starts(problem, split, launch, t, t.u, t.B, starts, backward=False)
    tensors = (*t.inputs(), _or(starts, t.A), y, _or(states, t.A), _or(last, t.A))
    strides = (*_strides(t.u), *_strides(t.delta), *t.decay_strides(), *_strides(t.B), *_strides(t.C))
    scan_forward[(problem.programs(launch, batch) * split.count,)](
        *(*tensors, *strides, *problem.sizes(), split.count, split.length, 1),
        SOFTPLUS=problem.softplus,
        HAS_INITIAL=starts is not None,
        SAVE=states is not None,
        SAVE_LAST=last is not None,
        CHUNK=tuning.chunk(),
        **t.given(),
        **scan_constants(problem.state, launch),
        **launch.options(),
    )


@on_its_device
def run_backward(
    problem: Problem,
    dy: Tensor,
    t: Tensors,
    states: Tensor,
    dlast: Tensor | None,
    du: Tensor,
    ddelta: Tensor,
    dinitial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Run the backward kernel. Writes du and ddelta (Bt, K, L, D), contiguous, and dinitial.

    Args:
        dy: (Bt, 1, D, L), channels adjacent in memory.
        dlast: (Bt, K, D, N), contiguous.

    Returns:
        dB and dC as one tensor (Bt, K, G, L, 2, N), and the float32 gradients of A, skip and bias, summed over the
        batch.
    """
    batch, device, state, dim, directions = len(t.delta), t.delta.device, problem.state, problem.dim, problem.directions
    launch = launch_of("scan_backward", problem, device)
    items = problem.programs(launch, batch)
    split = plan_split(problem, items, launch.warps, device)
    incoming = dlast
    if split.count > 1:
        local = launch_of("scan_forward", problem, device)
        incoming = split_starts(problem, split, local, t, dy, t.C, dlast, backward=True)
    # Several batch entries per program: its scratch then stays in the L2 cache, and dA has fewer partial sums.
    batches = tuning.forced("batches") or max(
        1, min(batch, items * split.count // (4 * tuning.multiprocessors(device)))
    )
    parts = -(-batch // batches) * split.count
    blocks = -(-problem.channels // launch.block_d)
    programs = items // batch * parts
    chunk = tuning.chunk()

    def buffer(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    constants = scan_constants(state, launch)
    scratch = buffer(programs, 2 * chunk + chunk // launch.unroll * constants["BLOCK_N"], launch.block_d)
    dA = buffer(parts, directions, dim, state)
    dBC = buffer(blocks, batch, directions, problem.groups, problem.length, 2, state)
    dskip = None if t.skip is None else buffer(parts, directions, dim)
    dbias = None if t.bias is None else buffer(parts, directions, dim)
    read = (dy, *t.inputs(), _or(t.initial, t.A), states, _or(incoming, t.A), scratch)
    written = (du, ddelta, dA, dBC, _or(dskip, dA), _or(dbias, dA), _or(dinitial, dA))
    strides = (dy.stride(0), dy.stride(3), *_strides(t.u), *_strides(t.delta), *_strides(t.B), *_strides(t.C))
    scan_backward[(programs,)](
        *(*read, *written, *strides, batch, batches, *problem.sizes(), split.count, split.length),
        SOFTPLUS=problem.softplus,
        HAS_INITIAL=t.initial is not None,
        HAS_INCOMING=incoming is not None,
        CHUNK=chunk,
        FOLD=launch.fold,
        TILE_T=min(8, chunk),
        **t.given(),
        **constants,
        **launch.options(),
    )
    dskip, dbias = (None if part is None else part.sum(0) for part in (dskip, dbias))
    return dBC[0] if blocks == 1 else dBC.sum(0), dA.sum(0), dskip, dbias


@on_its_device
def merge(parts: Tensor, z: Tensor | None, total: Tensor | None, out: Tensor) -> None:
    """Compute out = (Σ_k parts_k) · silu(z).

    Args:
        parts: (Bt, K, L, D), contiguous.
        z: (Bt, D, L), or None for no gate.
        total: (Bt, L, D) receives the sum before the gate, if not None.
        out: (Bt, L, D), contiguous.
    """
    batch, directions, length, dim = parts.shape
    merge_directions[(-(-length * dim // MERGE_BLOCK) * batch,)](
        *(parts, _or(z, parts), _or(total, out), out),
        *((0, 0) if z is None else (z.stride(0), z.stride(2))),
        *(length, dim),
        DIRECTIONS=directions,
        HAS_GATE=z is not None,
        SAVE=total is not None,
        BLOCK=MERGE_BLOCK,
        num_warps=4,
    )


@on_its_device
def ungate(dout: Tensor, total: Tensor, z: Tensor, dtotal: Tensor, dz: Tensor) -> None:
    """Compute the gradients of ``merge`` with respect to the sum and the gate.

    Args:
        dout, z: (Bt, D, L), channels adjacent in memory.
        total: (Bt, L, D) the sum before the gate.
        dtotal, dz: (Bt, L, D), contiguous: results.
    """
    batch, length, dim = total.shape
    gate_backward[(-(-length * dim // MERGE_BLOCK) * batch,)](
        *(dout, total, z, dtotal, dz),
        *(dout.stride(0), dout.stride(2), z.stride(0), z.stride(2)),
        *(length, dim),
        BLOCK=MERGE_BLOCK,
        num_warps=4,
    )
