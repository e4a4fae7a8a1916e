"""FSDP2 on CPUs: faster collectives, built from Gloo's send and receive, and a schedule for gathering parameters.

Gloo's collectives are slow here. torch implements reduce-scatter as an all-reduce, which sends every byte twice, and
all-gather copies all received data once more. Instead, each rank sends its shard directly to each other rank. For n
ranks this moves (n-1)/n of the tensor, which is the minimum. FSDP2 accepts custom collectives and buffers
(``FSDPModule.set_custom_all_gather``, ``set_custom_reduce_scatter``). Buffers are reused, since allocating new pages
costs as much as writing to them.

Gathering uses the same processors as computing. Large matrices are gathered separately, so that less memory is gathered
at once. Each unit prefetches the next one before it runs. The last half of the model stays gathered between the forward
and backward pass. This needs no additional memory at the peak, since gradients of the same size are allocated only
while it is released.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

# torch.distributed.fsdp does not export these base classes, although its setters require them.
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.profiler import record_function

from mmtrain.data.core.buffers import Buffers
from mmtrain.parallel.strategy import StrategyOptions

#: A matrix with more elements (10 MB of float32) is gathered separately. The reduction of its gradient is not deferred,
#: since its buffers would stay in memory too long.
LARGE = 2_500_000


def use_direct_collectives(model: nn.Module, options: StrategyOptions, mesh: DeviceMesh) -> DirectReduceScatter | None:
    """Install the direct collectives and the gathering schedule in the FSDP2 units of ``model``.

    Returns:
        The reduce-scatter of the units, or None if the shard axis of ``mesh`` has one rank.
    """
    world = mesh.size(mesh.ndim - 1)
    if world == 1:
        return None
    buffers = Buffers()
    gather, reduce = DirectAllGather(buffers), DirectReduceScatter(buffers, world)
    for unit in _units([model]):
        unit.set_custom_all_gather(gather)
        unit.set_custom_reduce_scatter(reduce)
    if options.plain:
        for unit in _last_half(options.blocks):
            unit.set_reshard_after_forward(False, recurse=False)
        # Each unit prefetches the next one of the same stack of blocks, which always runs after it.
        parents = {id(module): name.rpartition(".")[0] for name, module in model.named_modules()}
        stacks: dict[str, list[nn.Module]] = {}
        for block in options.blocks:
            stacks.setdefault(parents[id(block)], []).append(block)
        for stack in stacks.values():
            for unit, following in pairwise(_units(stack)):
                unit.set_modules_to_forward_prefetch([following])
    return reduce


def _units(modules: Sequence[nn.Module]) -> list[FSDPModule]:
    """Return the FSDP2 units within ``modules``, in order of execution for blocks."""
    return [unit for module in modules for unit in module.modules() if isinstance(unit, FSDPModule)]


def _last_half(blocks: Sequence[nn.Module]) -> list[FSDPModule]:
    """Return the last FSDP2 units of ``blocks`` that together have at most half of the parameters."""
    seen: set[int] = set()
    limit = sum(p.numel() for block in blocks for p in block.parameters()) / 2
    found: list[FSDPModule] = []
    for unit in reversed(_units(blocks)):
        fresh = [p for p in unit.parameters() if id(p) not in seen]  # type: ignore[attr-defined]
        seen |= {id(p) for p in fresh}
        limit -= sum(p.numel() for p in fresh)
        if limit < 0:
            break
        found.append(unit)
    return found


class DirectAllGather(AllGather):
    """All-gather with direct sends: the output contains the shard of each rank, in order of rank."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.buffers.tensor([int(n) for n in size], dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        shards, rank = output_tensor.chunk(group.size()), group.rank()
        if shards[rank].data_ptr() != input_tensor.data_ptr():
            shards[rank].copy_(input_tensor)
        return _exchange(dict.fromkeys(_others(group), input_tensor), dict(enumerate(shards)), group)


class DirectReduceScatter(ReduceScatter):
    """Reduce-scatter with direct sends: the sum or mean of this rank's shard over all ranks, added in order of rank.

    The output is the sharded gradient. It has its own memory, since it is needed until the step. If ``deferred`` is
    set, it is valid only after the next call or :meth:`finish`. The ranks then communicate while the backward pass
    continues, and no rank waits for a slightly slower one.
    """

    def __init__(self, buffers: Buffers, world: int) -> None:
        self.buffers, self.world = buffers, world
        self.deferred = False
        self._last = 0
        self._running: _Reduction | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        # FSDP2 allocates the input first, then the output.
        count = prod(int(n) for n in size)
        is_output = count * self.world == self._last
        self._last = 0 if is_output else count
        return torch.empty(count, dtype=dtype) if is_output else self.buffers.tensor([count], dtype)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        self.finish()
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group)
            return
        received = self.buffers.tensor((group.size() - 1, output_tensor.numel()), output_tensor.dtype)
        self._running = _Reduction(output_tensor, input_tensor, received, group, mean=op == dist.ReduceOp.AVG)
        if not self.deferred or input_tensor.numel() > LARGE:
            self.finish()

    def finish(self) -> None:
        """Wait for the running reduction, if there is one."""
        if self._running is not None:
            with record_function("direct::reduce_scatter"):
                self._running.finish()
            self._running = None


class _Reduction:
    """One reduce-scatter. The constructor starts the communication."""

    def __init__(
        self, output: Tensor, whole: Tensor, received: Tensor, group: dist.ProcessGroup, *, mean: bool
    ) -> None:
        self.output, self.divisor = output, group.size() if mean else 1
        self.shards, others = dict(enumerate(whole.chunk(group.size()))), _others(group)
        self.received = dict(zip(others, received.unbind(), strict=True))
        self.work = _exchange(self.shards, self.received, group)

    def finish(self) -> None:
        self.work.wait()
        terms = [self.received.get(n, shard) for n, shard in self.shards.items()]
        torch.add(terms[0], terms[1], out=self.output)
        for term in terms[2:]:
            self.output.add_(term)
        if self.divisor != 1:
            self.output.div_(self.divisor)


def _others(group: dist.ProcessGroup) -> list[int]:
    return [n for n in range(group.size()) if n != group.rank()]


class _All(dist.Work):
    """Several works, waited for together."""

    def __init__(self, works: list[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait()
        return True


def _exchange(outgoing: dict[int, Tensor], incoming: dict[int, Tensor], group: dist.ProcessGroup) -> dist.Work:
    """Start sending to and receiving from every other rank of ``group``. The keys are ranks within the group."""
    works = []
    for n in _others(group):
        works.append(dist.irecv(incoming[n], group=group, group_src=n))
        works.append(dist.isend(outgoing[n], group=group, group_dst=n))
    return _All([work for work in works if work is not None])
