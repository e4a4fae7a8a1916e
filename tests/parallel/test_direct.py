"""The collectives that go straight from rank to rank: right, in any number of ranks, and on memory nobody else has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmtrain.parallel.fsdp_cpu import Buffers, DirectAllGather, DirectReduceScatter
from mmtrain.parallel.ranks import init_distributed
from tests.parallel.gang import Gang


def _values(rank: int, count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(rank))


def exchanged(world: int) -> None:
    """Asserts on each rank; sizes that are no multiple of anything, and two gathers under way at once."""
    with init_distributed("cpu") as ranks:
        group, buffers = dist.group.WORLD, Buffers()
        gather, reduce = DirectAllGather(buffers), DirectReduceScatter(buffers, world)
        options = {"dtype": torch.float32, "device": torch.device("cpu")}
        pending = []
        for size in (1, 1001):
            whole = gather.allocate((world * size,), **options)
            mine = whole[ranks.rank * size : (ranks.rank + 1) * size].copy_(_values(ranks.rank, size))
            pending.append((whole, size, gather(whole, mine, group)))
        for whole, size, work in pending:
            work.wait()
            assert torch.equal(whole, torch.cat([_values(rank, size) for rank in range(world)]))
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX):
            source = reduce.allocate((world * 777,), **options)
            source.copy_(_values(ranks.rank, world * 777))
            target = reduce.allocate((777,), **options)
            reduce(target, source, group, op)
            parts = torch.stack([_values(rank, world * 777).chunk(world)[ranks.rank] for rank in range(world)]).double()
            exact = {
                dist.ReduceOp.SUM: parts.sum(0),
                dist.ReduceOp.AVG: parts.mean(0),
                dist.ReduceOp.MAX: parts.amax(0),
            }
            # float32, at most three terms of order 1
            torch.testing.assert_close(target.double(), exact[op], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_what_comes_out_is_what_the_ranks_put_in(world: int, tmp_path: Path) -> None:
    gang = Gang(world, tmp_path)
    try:
        gang.run(exchanged, world)
    finally:
        gang.stop()


@given(st.lists(st.one_of(st.integers(1, 5000), st.integers(-3, -1)), max_size=40))
def test_lent_memory_is_nobody_elses_until_it_comes_back(wishes: list[int]) -> None:
    """Positive: so many elements are asked for. Negative: one of the tensors that are out is dropped."""
    buffers, out = Buffers(), []
    for number, wish in enumerate(wishes):
        if wish > 0:
            tensor = buffers.tensor((wish,), torch.float32).fill_(number)
            out.append((number, wish, tensor[wish // 2 :], tensor.view(1, -1)))  # views keep it out as well
            del tensor
        elif out:
            out.pop(wish % len(out))
        for owner, count, half, row in out:
            assert row.shape == (1, count)
            assert bool((row == owner).all())
            assert bool((half == owner).all())


def test_memory_that_came_back_is_lent_again() -> None:
    buffers = Buffers()
    first = buffers.tensor((1000,), torch.float32)
    place = first.data_ptr()
    second = buffers.tensor((1000,), torch.float32)
    assert second.data_ptr() != place
    del first
    assert buffers.tensor((10, 50), torch.float32).data_ptr() == place
