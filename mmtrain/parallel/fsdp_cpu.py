"""FSDP2 between processes without a GPU: collectives over gloo's sends and receives, and what is gathered when.

gloo's own collectives are wasteful here: torch makes its reduce-scatter an all-reduce, which sends every byte twice,
and its all-gather copies all it receives once more. Each rank sends its part straight to each other rank instead, which
for n ranks moves the least there is to move, (n-1)/n of the tensor. FSDP2 takes collectives and their memory from
outside (``FSDPModule.set_custom_all_gather``, ``set_custom_reduce_scatter``). The buffers are kept from one collective
to the next, since fresh pages cost as much as what is written to them.

A gather takes the very processors that compute. So large matrices are gathered on their own, so that less is whole at
once. Each unit asks for the next one before it runs. And the last half of the model stays whole between the forward and
the backward pass: there is room for it, since the gradients, which are as large, come into being while it is let go.
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

# not exported by torch.distributed.fsdp, though its setters ask for them
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.profiler import record_function

from mmtrain.data.core.buffers import Buffers
from mmtrain.parallel.strategy import StrategyOptions

#: A matrix of more elements (10 MB of float32) is gathered on its own. Its gradient is not deferred, since what is sent
#: and received would be in memory for long.
LARGE = 2_500_000


def use_direct_collectives(model: nn.Module, options: StrategyOptions, mesh: DeviceMesh) -> DirectReduceScatter | None:
    """Set FSDP2 units up for processes on CPUs; returns what reduces their gradients, None in one process."""
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
        # each unit asks for the next one of its stack of blocks, which is certain to run after it
        parents = {id(module): name.rpartition(".")[0] for name, module in model.named_modules()}
        stacks: dict[str, list[nn.Module]] = {}
        for block in options.blocks:
            stacks.setdefault(parents[id(block)], []).append(block)
        for stack in stacks.values():
            for unit, following in pairwise(_units(stack)):
                unit.set_modules_to_forward_prefetch([following])
    return reduce


def _units(modules: Sequence[nn.Module]) -> list[FSDPModule]:
    """The FSDP2 units in ``modules``; of blocks, in the order in which they run."""
    return [unit for module in modules for unit in module.modules() if isinstance(unit, FSDPModule)]


def _last_half(blocks: Sequence[nn.Module]) -> list[FSDPModule]:
    """The last of the units in ``blocks`` that have at most half of their parameters together."""
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
    """Every rank's part, in the order of the ranks."""

    def __init__(self, buffers: Buffers) -> None:
        self.buffers = buffers

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.buffers.tensor([int(n) for n in size], dtype)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work:
        parts, rank = output_tensor.chunk(group.size()), group.rank()
        if parts[rank].data_ptr() != input_tensor.data_ptr():
            parts[rank].copy_(input_tensor)
        return _exchange(dict.fromkeys(_others(group), input_tensor), dict(enumerate(parts)), group)


class DirectReduceScatter(ReduceScatter):
    """The sum or the mean over the ranks of this rank's part, added in the order of the ranks.

    What comes out is the gradient of the parts, which lives until the step: it does not sit on the buffers that the
    next module needs. While ``deferred`` is set it is there only after the next call, or :meth:`finish`: the ranks send
    to each other while they go on with the backward pass, and none waits for one that is a little behind.
    """

    def __init__(self, buffers: Buffers, world: int) -> None:
        self.buffers, self.world = buffers, world
        self.deferred = False
        self._last = 0
        self._under_way: _Reduction | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        # FSDP2 asks for the input, then for the output
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
        self._under_way = _Reduction(output_tensor, input_tensor, received, group, mean=op == dist.ReduceOp.AVG)
        if not self.deferred or input_tensor.numel() > LARGE:
            self.finish()

    def finish(self) -> None:
        """Wait for the reduction under way, if there is one."""
        if self._under_way is not None:
            with record_function("direct::reduce_scatter"):
                self._under_way.finish()
            self._under_way = None


class _Reduction:
    """One reduce-scatter, begun when it is made."""

    def __init__(
        self, output: Tensor, whole: Tensor, received: Tensor, group: dist.ProcessGroup, *, mean: bool
    ) -> None:
        self.output, self.divisor = output, group.size() if mean else 1
        self.parts, others = dict(enumerate(whole.chunk(group.size()))), _others(group)
        self.arrived = dict(zip(others, received.unbind(), strict=True))
        self.work = _exchange(self.parts, self.arrived, group)

    def finish(self) -> None:
        self.work.wait()
        terms = [self.arrived.get(n, part) for n, part in self.parts.items()]
        torch.add(terms[0], terms[1], out=self.output)
        for term in terms[2:]:
            self.output.add_(term)
        if self.divisor != 1:
            self.output.div_(self.divisor)


def _others(group: dist.ProcessGroup) -> list[int]:
    return [n for n in range(group.size()) if n != group.rank()]


class _All(dist.Work):
    """Several works as one."""

    def __init__(self, works: list[dist.Work]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta | None = None) -> bool:
        for work in self._works:
            work.wait()
        return True


def _exchange(outgoing: dict[int, Tensor], incoming: dict[int, Tensor], group: dist.ProcessGroup) -> dist.Work:
    """Begin to send to and to receive from every other rank of ``group`` (numbers within it)."""
    works = []
    for n in _others(group):
        works.append(dist.irecv(incoming[n], group=group, group_src=n))
        works.append(dist.isend(outgoing[n], group=group, group_dst=n))
    return _All([work for work in works if work is not None])
