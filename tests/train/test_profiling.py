"""The profile of a few steps: which files, what is in them, on which ranks, and that nothing breaks a run."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmtrain.parallel.ranks import Ranks
from mmtrain.train import profiling
from mmtrain.train.profiling import StepProfiler

ALONE = Ranks(0, 1, torch.device("cpu"))


def go(profiler: StepProfiler, first: int, last: int) -> None:
    """Steps of a small model; 64 KiB of input each."""
    model = nn.Linear(64, 64)
    for number in range(first, last + 1):
        profiler.step(number)
        model(torch.ones(256, 64)).sum().backward()


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "profile").iterdir()}


def test_a_profile_has_the_steps_asked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mmtrain"), StepProfiler((3, 4), tmp_path, ALONE) as profiler:
        go(profiler, 1, 4)
        assert not (tmp_path / "profile").exists()
        go(profiler, 5, 7)
        assert len(caplog.records) == 1
        assert "memory snapshots exist for GPUs only" in caplog.text
    stem = "rank00000_steps3-4"
    assert names(tmp_path) == {f"trace_{stem}.json.gz", f"memory_{stem}.csv", f"ops_{stem}.txt"}
    with gzip.open(tmp_path / "profile" / f"trace_{stem}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if str(event["name"]).startswith("step ")]
    assert [event["name"] for event in sorted(steps, key=lambda e: e["ts"])] == ["step 3", "step 4"]
    forward = [event for event in events if event["name"] == "aten::addmm"]
    assert len(forward) == 2
    assert all(any(s["ts"] <= f["ts"] <= s["ts"] + s["dur"] for s in steps) for f in forward)
    assert forward[0]["args"]["Input Dims"][1] == [256, 64]
    assert "aten::addmm" in (tmp_path / "profile" / f"ops_{stem}.txt").read_text()


def test_the_timeline_adds_up(tmp_path: Path) -> None:
    with StepProfiler((1, 1), tmp_path, ALONE) as profiler:
        profiler.step(1)
        block = torch.ones(2**20)
        del block
        kept = torch.ones(2**18)
    rows = list(csv.DictReader((tmp_path / "profile" / "memory_rank00000_steps1-1.csv").open()))
    changes, levels = ([int(row[key]) for row in rows] for key in ("change", "allocated"))
    assert {4 * 2**20, -4 * 2**20, 4 * 2**18} <= set(changes)
    assert levels == [sum(changes[: i + 1]) for i in range(len(changes))]
    assert max(levels) >= 4 * 2**20
    assert levels[-1] == kept.nbytes
    assert [float(row["seconds"]) for row in rows] == sorted(float(row["seconds"]) for row in rows)


def test_the_timeline_is_in_the_order_of_time() -> None:
    events = [SimpleNamespace(name=lambda: "[memory]", start_ns=lambda t=t: t, nbytes=lambda n=n: n)
              for t, n in ((3_000, -8), (1_000, 8), (2_000, 4))]  # fmt: skip
    events.append(SimpleNamespace(name=lambda: "aten::add"))
    found = SimpleNamespace(profiler=SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events)))
    assert profiling._timeline(found).splitlines() == [  # type: ignore[arg-type]
        "seconds,change,allocated",
        "0.000000000,8,8",
        "0.000001000,4,12",
        "0.000002000,-8,4",
    ]


def test_a_run_that_ends_early_or_begins_late_gives_what_there_is(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), StepProfiler((2, 9), tmp_path, ALONE) as profiler:
        go(profiler, 1, 3)
        raise KeyboardInterrupt
    with StepProfiler((2, 9), tmp_path, ALONE) as profiler:
        go(profiler, 8, 11)
        go(profiler, 8, 9)  # a rollback: once is enough
    assert {name for name in names(tmp_path) if name.startswith("trace")} == {
        "trace_rank00000_steps2-3.json.gz",
        "trace_rank00000_steps8-9.json.gz",
    }


def test_a_span_that_is_past_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mmtrain"), StepProfiler((2, 3), tmp_path, ALONE) as profiler:
        go(profiler, 5, 7)
    assert [record.getMessage() for record in caplog.records] == [
        "train.profile: nothing to profile, the run resumes at step 5 after steps 2 to 3"
    ]
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_and_the_last_of_many_ranks_trace(tmp_path: Path) -> None:
    def traced(world: int) -> list[int]:
        cpu = torch.device("cpu")
        return [r for r in range(world) if StepProfiler((1, 1), tmp_path, Ranks(r, world, cpu)).span]

    assert traced(8) == list(range(8))
    assert traced(9) == [0, 8]
    with StepProfiler((1, 1), tmp_path, Ranks(8, 9, torch.device("cpu"))) as profiler:
        go(profiler, 1, 2)
    assert "trace_rank00008_steps1-1.json.gz" in names(tmp_path)


def test_without_a_span_it_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "profile", None)
    with StepProfiler(None, tmp_path, ALONE) as profiler:
        begin = time.thread_time()
        for number in range(1000):
            profiler.step(number)
        assert time.thread_time() - begin < 0.02
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("not a folder")
    with StepProfiler((1, 1), tmp_path, ALONE) as profiler:
        go(profiler, 1, 3)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "could not write" in caplog.text


def test_a_trace_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: object, path: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiling.profile, "export_chrome_trace", full)
    with StepProfiler((1, 1), tmp_path, ALONE) as profiler:
        go(profiler, 1, 3)
    assert "No space left on device" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_gives_a_memory_snapshot(tmp_path: Path) -> None:
    with StepProfiler((1, 1), tmp_path, Ranks(0, 1, torch.device("cuda", 0))) as profiler:
        profiler.step(1)
        torch.ones(256, 256, device="cuda").mm(torch.ones(256, 256, device="cuda"))
    assert "memory_rank00000_steps1-1.pickle" in names(tmp_path)
    assert "CUDA" in (tmp_path / "profile" / "ops_rank00000_steps1-1.txt").read_text()
