"""Planned memory against real runs on the CPU."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest

from mmtrain.config import ParallelConfig
from mmtrain.config.models import preset
from mmtrain.models.averaging import model_blocks
from mmtrain.parallel.fsdp import apply_fsdp
from mmtrain.plan import plan_run
from mmtrain.plan.sharding import Unit, fake_group, fsdp_units
from mmtrain.plan.step import meta_model
from mmtrain.plan.strategies import Memory, Workload, fsdp_memory, zero3_local, zero12_padded
from tests.conftest import ROOT
from tests.plan.real_runs import settings


def run(*names: str, **environment: str) -> list[dict[str, Any]]:
    """``real_runs`` in as many processes as names are given; what each printed."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.plan.real_runs", name],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, name in enumerate(names)
    ]
    said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(names)
    return [json.loads(text.splitlines()[-1]) for text in said]


def planned(strategy: str, world: int, model: str) -> Memory:
    row = plan_run(settings(model), 1, world).row(strategy)
    assert row is not None
    return row.memory


@pytest.mark.slow
def test_one_process_holds_what_is_planned() -> None:
    (found,) = run("alone")
    plan = planned("none", 1, "vim2_tiny")
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(plan, part) == pytest.approx(found[part], rel=0.1), part
    assert plan.state > 300e6  # far above what a process grows by on its own
    # measured from outside, whole: the state, and the activations, which the small images keep small
    assert plan.total == pytest.approx(found["grown"], rel=0.1)


@pytest.mark.slow
def test_two_processes_hold_what_is_planned_for_fsdp() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = run("sharded", "sharded", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    plan = planned("fsdp", 2, "vim2_micro")
    for rank in found:
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(plan, part) == pytest.approx(rank[part], rel=0.1), (rank["rank"], part)


@pytest.mark.parametrize("shape", [(8,), (2, 4), (100,)])
def test_units_of_a_thinned_model_are_those_of_the_whole(shape: tuple[int, ...]) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    config, model = preset("vim2_nano", token_mixers=[2, 4, 2]), meta_model(preset("vim2_nano", token_mixers=[2, 4, 2]))
    world = 1
    for size in shape:
        world *= size
    with fake_group(world):
        units = fsdp_units(meta_model(config), shape, ParallelConfig())
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
        apply_fsdp(model, model_blocks(model), mesh, ParallelConfig())
        local = sum(p.to_local().numel() for p in model.parameters())  # type: ignore[attr-defined]
    assert sum(unit.count * unit.local for unit in units) == local
    assert sum(unit.count * unit.whole for unit in units) == sum(p.numel() for p in model.parameters())
    assert all(unit.padded >= unit.whole for unit in units)


def test_narrow_gathers_leave_scans_and_norms_whole() -> None:
    with fake_group(4):
        units = fsdp_units(meta_model(preset("vim2_nano")), (4,), ParallelConfig(strategy="fsdp", gather="bf16"))
    assert {unit.wire_bytes for unit in units} == {2, 4}
    assert sum(unit.count * unit.whole for unit in units) == sum(
        p.numel() for p in meta_model(preset("vim2_nano")).parameters()
    )


def test_memory_of_every_strategy_by_hand() -> None:
    """P elements, no padding to speak of: the state in units of 4·P bytes."""
    config = settings("vim2_nano")
    config.train.ema_decay = 0.999
    plan = plan_run(config, 1, 2)
    size = 4 * plan.parameters
    by_hand = {
        "ddp": (1, 1, 2, 1),
        "fsdp": (0.5, 0.5, 1, 0.5),
        "hsdp": (0.5, 0.5, 1, 0.5),
        "zero1": (1, 1, 1.5, 1),  # its part of the weights once more, and two moments of that
        "zero2": (1, 0.5, 1.5, 1),
        "zero3": (0.5, 0.5, 1, 0.5),
    }
    for name, shares in by_hand.items():
        row = plan.row(name)
        assert row is not None
        found = (row.memory.weights, row.memory.gradients, row.memory.optimizer, row.memory.ema)
        assert [part / size for part in found] == pytest.approx(shares, rel=1e-2), name


@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("reshard", [True, False])
def test_what_fsdp_gathers_at_once_by_hand(reshard: bool, micros: int) -> None:
    units = [
        Unit(local=10, whole=18, shards=2, wire_bytes=4, root=True),
        Unit(local=30, whole=60, shards=2, wire_bytes=4, count=3),
        Unit(local=50, whole=99, shards=2, wire_bytes=2),
    ]
    found = fsdp_memory(Workload(parameters=297, kept=7, working=1000, micros=micros, ema=False), units, reshard)
    root, largest, every = 4 * 18, 4 * 60, 3 * 4 * 60 + 2 * 99
    arriving, reduction = 4 * 60, 4 * (99 + 100)
    gradients = 4 * 297 if micros > 1 else 0
    # the largest unit and the one that is fetched ahead of it, or all of them
    gathered = 2 * largest if reshard else every
    assert found.transient == 1000 + root + gathered + arriving + reduction + gradients
    local = 4 * (10 + 3 * 30 + 50)
    assert (found.weights, found.gradients, found.optimizer, found.ema) == (local, local, 2 * local, 0)


def test_padding_of_zero() -> None:
    model = meta_model(preset("vim2_nano"))
    elements = sum(p.numel() for p in model.parameters())
    assert zero12_padded(model, 1) - elements < 4
    assert zero12_padded(model, 64) % 128 == 0
    assert zero3_local(model, 1) == elements
    assert zero3_local(model, 10**9) == len(list(model.parameters()))


def test_with_several_micro_batches_sharded_gradients_stay_whole() -> None:
    config = settings("vim2_nano")
    config.train.batch_size, config.train.micro_batch = 8, 1
    plan = plan_run(config, 1, 2)
    assert plan.batch.micros == 4
    one = plan_run(settings("vim2_nano"), 1, 2)
    for name in ("fsdp", "zero2"):
        more, less = plan.row(name), one.row(name)
        assert more is not None and less is not None  # noqa: PT018
        grown = more.memory.total - less.memory.total
        assert grown >= 0.4 * 4 * plan.parameters, name
