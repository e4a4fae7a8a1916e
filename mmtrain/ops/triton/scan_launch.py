"""Launching the scan kernels: memory layouts, buffers, how the work is cut. No autograd here.

Inside, sequences are (Bt, K, L, D) with channels adjacent, B and C (Bt, K, G, L, N) with states adjacent, states
(Bt, K, ..., D, N). Channels-last tensors, which is what models give, are read in place; others are copied once, since
a warp reads 32 channels of one position, and 32 separate cache lines would cost more than the copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mmtrain.ops.triton import tuning
from mmtrain.ops.triton.conv_kernels import gate_backward, merge_directions
from mmtrain.ops.triton.scan_backward_kernels import scan_backward
from mmtrain.ops.triton.scan_kernels import scan_forward, split_carry, split_local
from mmtrain.ops.triton.tuning import Launch, on_its_device

BUFFER_BYTES = 512 * 2**20  # per-direction results are kept for so many batch entries at a time
MERGE_BLOCK = 1024


@dataclass(frozen=True)
class Problem:
    """A scan's sizes and what it is to do. channels: of one group."""

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
        """As the kernels take them."""
        return self.directions, self.groups, self.channels, self.height, self.width, self.packed_orders

    def programs(self, launch: Launch, batch: int) -> int:
        """Blocks of channels times groups, directions and batch entries."""
        return -(-self.channels // launch.block_d) * self.groups * self.directions * batch

    def chunks(self) -> int:
        return -(-self.length // tuning.chunk())


@dataclass(frozen=True)
class Split:
    """A sequence cut into ``count`` pieces of ``length`` positions, a multiple of the chunk."""

    count: int
    length: int


def plan_split(problem: Problem, programs: int, warps: int, device: torch.device) -> Split:
    """Cut only where fewer than four warps a multiprocessor would run: the cut itself costs another pass."""
    chunk = tuning.chunk()
    length = tuning.forced("split_length")
    if length is None:
        wanted = 8 * tuning.multiprocessors(device) // max(1, programs * warps)
        count = min(wanted, -(-problem.length // (4 * chunk))) if wanted > 2 else 1
        length = -(-problem.length // (max(count, 1) * chunk)) * chunk
    return Split(-(-problem.length // length), length)


def plan_forward(problem: Problem, batch: int, device: torch.device) -> tuple[Launch, Split]:
    """Fewer channels a program, that is more lanes for one channel, where the usual block leaves the GPU idle."""
    arch, name = tuning.architecture(device), tuning.state_class(problem.state)
    launch = tuning.narrower(tuning.lookup("scan_forward", name, arch), problem.channels)
    if problem.programs(launch, batch) * launch.warps < 8 * tuning.multiprocessors(device):
        launch = tuning.narrower(tuning.lookup("scan_forward_few", name, arch), problem.channels)
    return launch, plan_split(problem, problem.programs(launch, batch), launch.warps, device)


def batch_slices(batch: int, bytes_per_entry: int) -> list[slice]:
    """The batch in as few equal pieces as keep the buffers of a piece within :data:`BUFFER_BYTES`."""
    pieces = min(batch, -(-batch * bytes_per_entry // BUFFER_BYTES))
    size = -(-batch // max(1, pieces))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Batch entry, direction (0 if all share it), position of (Bt, K or 1, D, L)."""
    return tensor.stride(0), 0 if tensor.shape[1] == 1 else tensor.stride(1), tensor.stride(3)


def _row_strides(tensor: Tensor) -> tuple[int, int, int, int]:
    """Batch entry, direction, group, position of (Bt, K, G, N, L)."""
    return tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(4)


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def split_starts(
    problem: Problem,
    split: Split,
    launch: Launch,
    value: Tensor,
    delta: Tensor,
    A: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    backward: bool,
) -> Tensor:
    """The state at the start (backwards: at the end) of every split, (Bt, K, splits, D, N) float32."""
    batch, dim, state = delta.shape[0], problem.dim, problem.state
    ends = delta.new_empty(batch, problem.directions, split.count, dim, state, dtype=torch.float32)
    steps = delta.new_empty(batch, problem.directions, split.count, dim, dtype=torch.float32)
    split_local[(problem.programs(launch, batch) * split.count,)](
        value,
        delta,
        A,
        rows,
        A if bias is None else bias,
        ends,
        steps,
        *_strides(value),
        *_strides(delta),
        *(A.stride(0), A.stride(2), A.stride(1)),
        *_row_strides(rows),
        *problem.sizes(),
        split.count,
        split.length,
        STATE=state,
        SOFTPLUS=problem.softplus,
        HAS_BIAS=bias is not None,
        BACKWARD=backward,
        UNROLL=launch.unroll,
        BLOCK_D=launch.block_d,
        BLOCK_N=triton.next_power_of_2(state),
        **launch.options(),
    )
    split_carry[(-(-state * dim // 128) * batch * problem.directions,)](
        ends,
        steps,
        A,
        ends if initial is None else initial,
        *(A.stride(0), A.stride(2), A.stride(1)),
        problem.directions,
        dim,
        split.count,
        STATE=state,
        HAS_INITIAL=initial is not None,
        BACKWARD=backward,
        BLOCK=128,
        num_warps=4,
    )
    return ends


@on_its_device
def run_forward(
    problem: Problem,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    y: Tensor,
    states: Tensor | None,
    last: Tensor | None,
) -> None:
    """Fill y (Bt, K, L, D) dense, and the states where wanted. The rest: as the kernels take it."""
    batch = delta.shape[0]
    launch, split = plan_forward(problem, batch, delta.device)
    starts = initial
    if split.count > 1:
        starts = split_starts(problem, split, launch, u, delta, A, B, bias, initial, backward=False)
    scan_forward[(problem.programs(launch, batch) * split.count,)](
        u,
        delta,
        A,
        B,
        C,
        A if skip is None else skip,
        A if bias is None else bias,
        A if starts is None else starts,
        y,
        A if states is None else states,
        A if last is None else last,
        *_strides(u),
        *_strides(delta),
        *(A.stride(0), A.stride(2), A.stride(1)),
        *_row_strides(B),
        *_row_strides(C),
        *problem.sizes(),
        split.count,
        split.length,
        1,
        STATE=problem.state,
        SOFTPLUS=problem.softplus,
        HAS_SKIP=skip is not None,
        HAS_BIAS=bias is not None,
        HAS_INITIAL=starts is not None,
        SAVE=states is not None,
        SAVE_LAST=last is not None,
        CHUNK=tuning.chunk(),
        UNROLL=launch.unroll,
        BLOCK_D=launch.block_d,
        BLOCK_N=triton.next_power_of_2(problem.state),
        **launch.options(),
    )


@dataclass
class Sums:
    """Gradients of the parameters (K, ...), float32, added up over slices of the batch."""

    dA: Tensor
    dskip: Tensor | None
    dbias: Tensor | None


@on_its_device
def run_backward(
    problem: Problem,
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    states: Tensor,
    dlast: Tensor | None,
    du: Tensor,
    ddelta: Tensor,
    dinitial: Tensor | None,
) -> tuple[Tensor, Sums]:
    """Fill du, ddelta (Bt, K, L, D) dense and dinitial; return dB and dC, (Bt, K, G, L, 2, N), and the sums.

    dy: (Bt, 1, D, L), channels adjacent. dlast, initial: (Bt, K, D, N) dense.
    """
    batch, device, state, dim, directions = delta.shape[0], delta.device, problem.state, problem.dim, problem.directions
    arch = tuning.architecture(device)
    launch = tuning.narrower(tuning.lookup("scan_backward", tuning.state_class(state), arch), problem.channels)
    items = problem.programs(launch, batch)
    split = plan_split(problem, items, launch.warps, device)
    incoming = dlast
    if split.count > 1:
        local = tuning.narrower(tuning.lookup("scan_forward", tuning.state_class(state), arch), problem.channels)
        incoming = split_starts(problem, split, local, dy, delta, A, C, bias, dlast, backward=True)
    # Several batch entries to a program: its scratch then stays in the L2 cache, and dA has fewer partial sums.
    batches = tuning.forced("batches") or max(
        1, min(batch, items * split.count // (4 * tuning.multiprocessors(device)))
    )
    parts = -(-batch // batches) * split.count
    blocks = -(-problem.channels // launch.block_d)
    programs = items // batch * parts
    block_n = triton.next_power_of_2(state)
    chunk = tuning.chunk()

    def buffer(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    scratch = buffer(programs, 2 * chunk + chunk // launch.unroll * block_n, launch.block_d)
    dA = buffer(parts, directions, dim, state)
    dBC = buffer(blocks, batch, directions, problem.groups, problem.length, 2, state)
    dskip = None if skip is None else buffer(parts, directions, dim)
    dbias = None if bias is None else buffer(parts, directions, dim)
    scan_backward[(programs,)](
        dy,
        u,
        delta,
        A,
        B,
        C,
        A if skip is None else skip,
        A if bias is None else bias,
        A if initial is None else initial,
        states,
        A if incoming is None else incoming,
        scratch,
        du,
        ddelta,
        dA,
        dBC,
        dA if dskip is None else dskip,
        dA if dbias is None else dbias,
        dA if dinitial is None else dinitial,
        dy.stride(0),
        dy.stride(3),
        *_strides(u),
        *_strides(delta),
        *_row_strides(B),
        *_row_strides(C),
        batch,
        batches,
        *problem.sizes(),
        split.count,
        split.length,
        STATE=state,
        SOFTPLUS=problem.softplus,
        HAS_SKIP=skip is not None,
        HAS_BIAS=bias is not None,
        HAS_INITIAL=initial is not None,
        HAS_INCOMING=incoming is not None,
        CHUNK=chunk,
        UNROLL=launch.unroll,
        FOLD=launch.fold,
        TILE_T=min(8, chunk),
        BLOCK_D=launch.block_d,
        BLOCK_N=block_n,
        **launch.options(),
    )
    sums = Sums(dA.sum(0), None if dskip is None else dskip.sum(0), None if dbias is None else dbias.sum(0))
    return dBC[0] if blocks == 1 else dBC.sum(0), sums


@on_its_device
def merge(parts: Tensor, z: Tensor | None, total: Tensor | None, out: Tensor) -> None:
    """out (Bt, L, D) = (Σ_k parts (Bt, K, L, D)) · silu(z (Bt, D, L)); the sum itself to ``total`` if given."""
    batch, directions, length, dim = parts.shape
    merge_directions[(-(-length * dim // MERGE_BLOCK) * batch,)](
        parts,
        parts if z is None else z,
        out if total is None else total,
        out,
        *((0, 0) if z is None else (z.stride(0), z.stride(2))),
        length,
        dim,
        DIRECTIONS=directions,
        HAS_GATE=z is not None,
        SAVE=total is not None,
        BLOCK=MERGE_BLOCK,
        num_warps=4,
    )


@on_its_device
def ungate(dout: Tensor, total: Tensor, z: Tensor, dtotal: Tensor, dz: Tensor) -> None:
    """Fill dtotal and dz (Bt, L, D) dense from dout and z (Bt, D, L), channels adjacent, and total (Bt, L, D)."""
    batch, length, dim = total.shape
    gate_backward[(-(-length * dim // MERGE_BLOCK) * batch,)](
        dout,
        total,
        z,
        dtotal,
        dz,
        *(dout.stride(0), dout.stride(2), z.stride(0), z.stride(2)),
        length,
        dim,
        BLOCK=MERGE_BLOCK,
        num_warps=4,
    )
