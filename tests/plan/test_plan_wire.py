"""Bytes on the wire: the formulas against what FSDP2 and DDP really issue, on a fake process group."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmtrain.config import ParallelConfig
from mmtrain.config.models import preset
from mmtrain.models import build_model
from mmtrain.models.averaging import model_blocks
from mmtrain.parallel.fsdp import apply_fsdp
from mmtrain.plan import strategies
from mmtrain.plan.sharding import fake_group, fsdp_units
from mmtrain.plan.step import meta_model

MODEL = preset("vim2_nano")
#: The collectives, and whether the whole tensor is their first or second argument.
_OPS = {"_allgather_base_": ("all-gather", 0), "_reduce_scatter_base_": ("reduce-scatter", 1)}


class Issued(TorchDispatchMode):
    """Bytes of the whole tensors, and calls, of each kind of collective that is issued in the context."""

    def __init__(self) -> None:
        super().__init__()
        self.payload: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            assert name in _OPS or name == "allreduce_", f"an unforeseen collective: {name}"
            kind, where = _OPS.get(name, ("all-reduce", 0))
            tensors = [t for t in tree_leaves(args[where]) if isinstance(t, torch.Tensor)]
            self.payload[kind] += sum(t.nbytes for t in tensors)
            self.calls[kind] += 1
        return func(*args, **(kwargs or {}))


def issue(shape: tuple[int, ...], config: ParallelConfig, micros: int) -> Issued:
    model = build_model(MODEL).train()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    apply_fsdp(model, model_blocks(model), mesh, config)
    root = cast(FSDPModule, model)
    with Issued() as issued:
        for micro in range(micros):
            root.set_is_last_backward(micro == micros - 1)
            root.set_requires_gradient_sync(micro == micros - 1)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.gather == "bf16"):
                loss = model(torch.zeros(1, 3, 16, 16)).sum()
            loss.backward()
    return issued


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((8,), {"strategy": "fsdp"}),
        ((8,), {"strategy": "fsdp", "reshard_after_forward": False}),
        ((8,), {"strategy": "fsdp", "gather": "bf16"}),
        ((100,), {"strategy": "fsdp"}),
        ((2, 4), {"strategy": "hsdp"}),
    ],
)
def test_fsdp_issues_what_is_planned(shape: tuple[int, ...], options: dict[str, Any], micros: int) -> None:
    config = ParallelConfig(**options)
    copies = shape[0] if len(shape) == 2 else 1
    world = shape[-1] * copies
    with fake_group(world):
        units = fsdp_units(meta_model(MODEL), shape, config)
        issued = issue(shape, config, micros)
    planned = strategies.fsdp_transfers(units, copies, micros, config.reshard_after_forward, False, False)
    assert {t.kind: t.payload for t in planned} == dict(issued.payload)
    assert {t.kind: t.calls for t in planned} == dict(issued.calls)


def test_ddp_issues_what_is_planned() -> None:
    model = build_model(MODEL).train()
    buckets: list[int] = []

    def hook(state, bucket):  # type: ignore[no-untyped-def] # DDP refuses annotations that are strings
        buckets.append(bucket.buffer().nbytes)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    with fake_group(8):
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
        parallel.register_comm_hook(None, hook)
        parallel(torch.zeros(1, 3, 16, 16)).sum().backward()
    (planned,) = strategies.ddp_transfers(sum(p.numel() for p in model.parameters()), 8, False)
    assert planned.payload == sum(buckets)
    assert planned.sent == pytest.approx(2 * 7 / 8 * sum(buckets))


def test_rings_by_hand() -> None:
    assert strategies.Transfer("all-gather", 800, 8, 1).sent == 700
    assert strategies.Transfer("reduce-scatter", 800, 8, 1).sent == 700
    assert strategies.Transfer("all-reduce", 800, 8, 1).sent == 1400
    assert strategies.Transfer("all-reduce", 800, 1, 1).sent == 0


def test_stages_of_zero_by_hand() -> None:
    def sent(stage: int, elements: int, micros: int = 1, reshard: bool = False) -> float:
        found = strategies.zero_transfers(stage, elements, elements, 4, micros, False, reshard)
        return sum(t.sent for t in found) / (4 * elements * 3 / 4)

    assert sent(1, 1000) == sent(2, 1000) == 3
    assert sent(3, 1000) == 2  # what was gathered is kept for the backward pass
    assert sent(3, 10**12) == pytest.approx(3, rel=1e-2)
    assert sent(3, 1000, micros=3) == 4
    assert sent(3, 1000, reshard=True) == 3
    assert sent(3, 1000, micros=3, reshard=True) == 7


def test_a_process_group_is_left_as_it_was_found() -> None:
    import torch.distributed as dist

    from mmtrain.errors import UserError

    def fail_within() -> None:
        with fake_group(4096):
            assert dist.get_world_size() == 4096
            with pytest.raises(UserError, match="already has one"), fake_group(2):
                pass
            assert dist.get_world_size() == 4096
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fail_within()
    assert not dist.is_initialized()
