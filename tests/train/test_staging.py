"""The copy that an asynchronous save writes from."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from mmtrain.parallel.ranks import Ranks, init_distributed
from mmtrain.train.checkpoint.store import CheckpointStore
from mmtrain.train.checkpoint.tensor_files import Stage, read_tensors


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"w": torch.full((3, 4), value), "b": torch.full((), value)},
        "exp_avg": {"w": torch.zeros(3, 4).T},
    }


def test_the_copy_does_not_follow_the_state() -> None:
    state = parts(1)
    copied = Stage().copy(state)
    for tensors in state.values():
        for tensor in tensors.values():
            tensor.fill_(9)
    assert torch.equal(copied["model"]["w"], torch.full((3, 4), 1.0))
    assert copied["model"]["b"].item() == 1
    assert torch.equal(copied["exp_avg"]["w"], torch.zeros(4, 3))


def test_every_copy_goes_into_the_memory_that_was_prepared() -> None:
    stage = Stage()
    stage.prepare(parts(0))
    first = stage.copy(parts(1))["model"]["w"]
    second = stage.copy(parts(2))["model"]["w"]
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second, torch.full((3, 4), 2.0))
    assert stage.copy({"model": {"w": torch.ones(5)}})["model"]["w"].shape == (5,)  # nor is another shape refused


def test_a_sharded_tensor_stays_one() -> None:
    with init_distributed("cpu", group=True):
        whole = torch.arange(12.0).view(6, 2)
        sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
        copied = Stage().copy({"model": {"w": sharded}})["model"]["w"]
        sharded.to_local().zero_()
        assert isinstance(copied, DTensor)
        assert copied.placements == (Shard(0),)
        assert torch.equal(copied.full_tensor(), whole)


def test_what_an_asynchronous_save_writes_is_the_state_at_the_call(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Ranks(0, 1, torch.device("cpu")), asynchronous=True)
    state = parts(1)
    store.prepare(state)
    store.save(1, state, {})
    state["model"]["w"].fill_(7)
    store.wait()
    store.close()
    found = parts(0)
    read_tensors(store.at(1), found, alone=True)
    assert torch.equal(found["model"]["w"], torch.full((3, 4), 1.0))
