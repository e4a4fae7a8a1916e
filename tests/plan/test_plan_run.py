"""Whole plans: what is chosen, what is said, what is refused, and how large a cluster is planned how fast."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config import RunConfig, load_config
from mmtrain.data.images.tar_index import index_shard
from mmtrain.errors import UserError
from mmtrain.plan import GPUS, Plan, find_gpu, plan_run, render
from mmtrain.plan.dataset import describe_dataset
from mmtrain.plan.planner import cut_batch
from mmtrain.plan.roofline import _transfer_time
from mmtrain.plan.strategies import Transfer
from tests.conftest import ROOT, Cli

SMALL = ["model=vim2_nano", "data.image_size=16"]


def images(*overrides: str) -> RunConfig:
    return load_config("vim2_base_in1k", [*SMALL, *overrides])


@functools.cache
def planned(*overrides: str, nodes: int = 1, gpus: int = 8, gpu: str = "h100", samples: int | None = None) -> Plan:
    """One plan for all tests that look at it."""
    return plan_run(images(*overrides), nodes, gpus, gpu, samples=samples)


def test_unknown_gpus_and_impossible_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'h100'"):
        find_gpu("h10")
    assert find_gpu("H100") is GPUS["h100"]
    for nodes, gpus, word in ((0, 8, "--nodes 0"), (1, 0, "--gpus-per-node 0"), (513, 8, "4104 ranks")):
        with pytest.raises(UserError, match=word):
            plan_run(images(), nodes, gpus)
    with pytest.raises(UserError, match="--samples 0"):
        plan_run(images(), 1, 1, samples=0)
    with pytest.raises(UserError, match="data=series"):
        plan_run(load_config("vim2_base_in1k", ["data=series"]), 1, 1)
    with pytest.raises(UserError, match="at least"):
        plan_run(load_config("vim2_base_in1k", ["data.image_size=2"]), 1, 1)


def test_gpus_are_plausible_and_name_their_source() -> None:
    wanted = {"h100", "h200", "a100-80gb", "a100-40gb", "l40s", "v100", "rtx4090", "mi300x", "b200"}
    assert set(GPUS) == wanted
    for gpu in GPUS.values():
        assert gpu.source and gpu.links  # noqa: PT018
        assert gpu.rate("fp32") <= gpu.rate("tf32") <= gpu.rate("fp16") and gpu.inter < gpu.intra < gpu.bandwidth  # noqa: PT018
    assert GPUS["h100"].matrix_rate("bfloat16", True) > GPUS["h100"].matrix_rate("float32", True)
    assert GPUS["h100"].matrix_rate("float32", True) > GPUS["h100"].matrix_rate("float32", False)


def test_the_simplest_that_fits_is_chosen() -> None:
    assert planned(gpus=1).choice == "none"
    assert planned(gpus=2).choice == "ddp"
    plan = planned(gpus=2)
    assert [row.strategy for row in plan.rows] == ["ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"]
    assert "single rank" in plan.left_out["none"]
    assert plan.warnings == []


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    full = planned("model.num_classes=2000000", "train.batch_size=8")
    whole, sharded = (full.row(name) for name in ("ddp", "fsdp"))
    assert whole is not None and sharded is not None  # noqa: PT018
    between = (whole.memory.total + sharded.memory.total) / 2 / 0.9 / 2**30
    monkeypatch.setitem(GPUS, "small", dataclasses.replace(GPUS["h100"], name="small", memory=between))
    plan = planned("model.num_classes=2000000", "train.batch_size=8", gpu="small")
    assert plan.choice in ("fsdp", "hsdp")
    assert "parallel.strategy=ddp needs" in plan.warnings[0]
    monkeypatch.setitem(GPUS, "tiny", dataclasses.replace(GPUS["h100"], name="tiny", memory=0.001))
    plan = planned(gpu="tiny")
    assert plan.choice is None
    assert "train.checkpointing=full" in plan.warnings[0]
    assert "train.micro_batch=64" in render(plan)


def test_the_batch_is_cut_as_training_cuts_it() -> None:
    assert (cut_batch(images(), 32).samples, cut_batch(images(), 32).micros) == (32, 1)
    cut = cut_batch(images("train.accumulation=2", "train.micro_batch=8"), 32)
    assert (cut.samples, cut.micros, cut.problem) == (8, 4, "")
    plan = planned("train.batch_size=100")
    assert plan.batch.samples == 12
    assert "NOTE: train.batch_size=100 is not divisible by 8 ranks" in render(plan)
    assert "(96 or 104)" in plan.warnings[0]
    assert cut_batch(images("train.batch_size=4"), 8).samples == 1
    wrong = planned("parallel.strategy=hsdp", "parallel.shard_size=3")
    assert "shard_size=3" in wrong.warnings[0]


def test_time_rests_on_the_data_sheet() -> None:
    slow, fast = (planned(gpu=gpu) for gpu in ("v100", "h100"))
    assert slow.basis.time.total > fast.basis.time.total
    across, within = (planned(nodes=nodes, gpus=8 // nodes).row("ddp") for nodes in (2, 1))
    assert across is not None and within is not None  # noqa: PT018
    assert across.time.communication > within.time.communication
    assert across.wire == within.wire
    gather = Transfer("all-gather", 36 * 10**9, 2, 1)
    assert _transfer_time(gather, GPUS["h100"]) == pytest.approx(18 / 360, rel=1e-3)  # 80 % of 450 GB/s


def test_lengths_and_rates(waves: Path, digits: Path) -> None:
    assumed = planned()
    assert assumed.dataset.samples == 1_281_167
    assert "assumed" in assumed.dataset.origin
    assert assumed.recipe is not None
    assert assumed.recipe.steps == -(-300 * 1_281_167 // 1024)
    assert assumed.recipe.gpu_hours == pytest.approx(assumed.recipe.days * 24 * 8)
    assert assumed.samples_per_second == pytest.approx(1024 / assumed.basis.time.total)
    unknown = planned("model.num_classes=7")
    assert unknown.recipe is None
    assert "--samples" in render(unknown)
    told = planned("model.num_classes=7", "train.epochs=2", samples=10240)
    assert told.recipe is not None
    assert told.recipe.steps == 20
    found = describe_dataset(load_config("vim2_digits", [f"data.root={digits}"]))
    assert found.samples is not None
    assert 1000 < found.samples < 1797
    assert 50 < found.stored < 5000
    series = describe_dataset(load_config("tsm2_traffic", [f"data.path={waves}", "data.columns=null"]))
    assert series.samples == 420 - (336 + 48) + 1
    assert series.stored == 4 * (336 + 48) * 3
    missing = describe_dataset(load_config("tsm2_etth1", ["data.root=/nowhere"]))
    assert missing.samples is None
    assert "--samples" in missing.origin
    assert "ETTh1: no such file" in missing.origin


def test_what_training_leaves_out_is_not_planned_with(digits: Path, tmp_path: Path) -> None:
    shutil.copytree(digits, tmp_path / "set")
    shards = sorted((tmp_path / "set/train").glob("*.tar"))
    shards[0].write_bytes(b"")
    whole, left = (
        describe_dataset(load_config("vim2_digits", ["data.faults=skip", f"data.root={root}"]))
        for root in (digits, tmp_path / "set")
    )
    assert whole.samples is not None
    assert left.samples == whole.samples - len(index_shard(digits / "train" / shards[0].name))
    with pytest.raises(UserError, match="is empty"):
        describe_dataset(load_config("vim2_digits", [f"data.root={tmp_path / 'set'}"]))


# ---------------------------------------------------------------- the command line


def test_the_command_prints_rows_and_what_follows(cli: Cli, tmp_path: Path) -> None:
    done = cli(
        "plan", "--config", "vim2_base_in1k", "--nodes", "2", "--gpus-per-node", "4", "--gpu", "a100-40gb", *SMALL
    )
    assert done.returncode == 0, done.stderr
    for word in (
        "2 × 4 × a100-40gb",
        "fsdp",
        "zero3",
        "recommended strategy: ddp",
        "never measured",
        "1,281,167",
        "GPU-hours",
    ):
        assert word in done.stdout
    refused = cli("plan", "--config", "vim2_base_in1k", "--gpu", "a100", *SMALL)
    assert refused.returncode == 2
    assert "did you mean 'a100" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_shows_the_plan(cli: Cli) -> None:
    job = ("launch/submit.py", "--config", "vim2_base_in1k", "--nodes", "2", "--dry-run", *SMALL)
    assert "recommended strategy: ddp" in cli(*job).stdout
    assert "plan: none, because cluster.gpus_per_node is 0" in cli(*job, "--gpus-per-node", "0").stdout
    unknown = cli(*job, "--gpu", "h999")
    assert unknown.returncode == 0
    assert "plan: none: " in unknown.stdout


def test_submitting_what_cannot_run_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    from mmtrain.cluster import job

    with caplog.at_level(logging.WARNING, "mmtrain"):
        job.warn_of_misfits(images("cluster.nodes=2"))
        assert not caplog.records
        job.warn_of_misfits(images("train.batch_size=100"))
    assert "train.batch_size=100" in caplog.text


#: Prints processor time, not wall-clock time: it runs on one thread, so the two are the same on a machine that is free,
#: and the first does not tell of what else runs beside the tests.
_LARGEST = """
import json, resource, sys, time
from mmtrain.config import load_config
from mmtrain.plan import plan_run
plan = plan_run(load_config("vim2_base_in1k", sys.argv[1:]), 512, 8)
seconds, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({"seconds": seconds, "gib": peak, "rows": len(plan.rows), "world": plan.world}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [["model=vim2_huge", "train.batch_size=8192"], []], ids=["huge", "base"])
def test_4096_ranks_are_planned_in_a_minute_and_4_gib(overrides: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _LARGEST, *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=900)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == 6
    assert found["world"] == 4096
    assert found["seconds"] <= 60
    assert found["gib"] <= 4
