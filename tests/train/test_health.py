"""Memory, the movement of the averaging's weights (whole and sharded), the slowest rank."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from processes import in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmtrain.config.models import preset
from mmtrain.inspect.learned import averaging_matrices
from mmtrain.models import build_model
from mmtrain.models.averaging import MixerStack, WeightedAverage
from mmtrain.parallel.ranks import Ranks
from mmtrain.train import meter
from mmtrain.train.meter import Straggler, StragglerWatch, averaging_norms, memory_peak, slowest

SIZES = {"dims": [8, 16], "token_mixers": [4, 2], "channel_expand": [1, 1], "num_classes": 3}


def moved_model() -> nn.Module:
    """ViM2 of two stages whose averaging has left its start, the same in every process."""
    torch.manual_seed(0)
    model = build_model(preset("vim2_nano", **SIZES))
    for module in model.modules():
        if isinstance(module, WeightedAverage):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 1.0)
    return model


def test_nothing_has_moved_at_the_start() -> None:
    fresh = build_model(preset("vim2_nano", **SIZES))
    assert averaging_norms(fresh) == dict.fromkeys(("alpha", "beta", "theta", "gamma", "out"), 0.0)
    assert averaging_norms(build_model(preset("vim2_nano", averaging=False))) == {}


def test_each_weight_counts_in_its_family() -> None:
    """Against the families that the heat maps show, one weight at a time."""
    model = build_model(preset("vim2_nano", **SIZES))
    letters = {"α": "alpha", "β": "beta", "θ": "theta", "γ": "gamma", "": "out"}
    stacks = [m for m in model.modules() if isinstance(m, MixerStack)]
    count = dict.fromkeys(letters.values(), 0)
    for stack, matrix in zip(stacks, averaging_matrices(model), strict=True):
        for row, average in enumerate(stack.averages):
            for column in range(row + 1):
                letter = matrix.family(row, column)
                both = [letters[part] for part in letter.split("+")] if "+" in letter else [letters[letter]] * 2
                places = [(average.get_parameter("weight"), column)]
                places += [(average.get_parameter("input_copy"), 0)] if column == 0 else []
                for (parameter, place), family in zip(places, both, strict=False):
                    count[family] += 1
                    with torch.no_grad():
                        before = parameter[place].clone()
                        parameter[place] += 0.5
                        found = averaging_norms(model)
                        parameter[place] = before
                    assert {name for name, norm in found.items() if norm} == {family}
                    found_size = (0.5 / found[family]) ** 2
                    assert found_size == pytest.approx(round(found_size)), "the mean over the family's elements"
    # 4 token mixers in turn with 2 channel mixers, then 2 with 1: TTCTTC and TTC
    assert count["alpha"] == (1 + 2 + 3 + 4) + (1 + 2)
    assert sum(count.values()) == sum(
        p.numel() for m in model.modules() if isinstance(m, WeightedAverage) for p in m.parameters()
    )


def test_the_norm_is_the_root_mean_square_distance_from_the_start() -> None:
    model = build_model(preset("tsm2", lookback=32, depth=1))
    out = next(m for m in model.modules() if isinstance(m, MixerStack)).averages[-1]
    with torch.no_grad():
        out.get_parameter("weight").copy_(torch.tensor([1.0, 3.0, 0.0]))
        out.get_parameter("input_copy").fill_(-2.0)
    assert averaging_norms(model)["out"] == pytest.approx(math.sqrt((0 + 4 + 1 + 4) / 4))


def test_a_parameter_that_is_elsewhere_is_refused() -> None:
    model = moved_model()
    average = next(m for m in model.modules() if isinstance(m, WeightedAverage))
    average.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="gather"):
        averaging_norms(model)


def work(ranks: Ranks) -> tuple[list[dict[str, float]], Straggler | None]:
    """The norms under FSDP2 over all ranks, under HSDP, and under DDP; and the straggler."""
    sharded = moved_model()
    for block in sharded.modules():
        if isinstance(block, MixerStack):
            fully_shard(block)
    fully_shard(sharded)
    mesh = init_device_mesh("cpu", (ranks.world, 1), mesh_dim_names=("replicate", "shard"))
    hybrid = fully_shard(moved_model(), mesh=mesh)
    norms = [averaging_norms(model) for model in (sharded, hybrid, DistributedDataParallel(moved_model()))]
    return norms, StragglerWatch(ranks).check([0.1, 0.4][ranks.rank])


@pytest.mark.slow
def test_two_ranks_agree_with_one_and_hear_of_the_slowest(tmp_path: Path) -> None:
    expected = averaging_norms(moved_model())
    for norms, slow in in_processes(work, 2, tmp_path):
        assert [found == pytest.approx(expected, rel=1e-12) for found in norms] == [True] * 3
        assert slow == Straggler(1, 0.4, 0.25, 1.6)


# ------------------------------------------------------------------ memory


def test_the_peak_remembers_what_was_freed() -> None:
    before = memory_peak(torch.device("cpu"))
    assert 0.05 < before < 64
    block = torch.ones(128 * 2**20)  # half a GiB
    del block
    assert memory_peak(torch.device("cpu")) >= before
    assert memory_peak(torch.device("cpu")) > 0.5


# ------------------------------------------------------------------ stragglers


def test_the_slowest_against_the_median() -> None:
    assert slowest([1.0, 1.1, 3.3, 1.1]) == Straggler(2, 3.3, 1.1, pytest.approx(3.0))  # type: ignore[arg-type]
    assert slowest([0.0, 0.0]).slowest_ratio == 1.0
    assert slowest([1.0, 2.0]).slowest_rank == 1


def test_alone_nobody_is_slow() -> None:
    assert StragglerWatch(Ranks(0, 1, torch.device("cpu"))).check(1.0) is None


def test_the_warning_comes_once_in_a_while(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    now, seconds = [1000.0], [1.0, 1.0, 1.25]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(meter.dist, "all_gather_single", lambda every, mine: every.copy_(torch.tensor(seconds)))
    watch, other = (StragglerWatch(Ranks(rank, 3, torch.device("cpu"))) for rank in (0, 1))
    with caplog.at_level(logging.WARNING, "mmtrain"):
        watch.check(1.0)
        assert not caplog.records, "25 % over the median is no warning"
        seconds[2] = 2.0
        for now[0] in (1000.0, 1010.0, 1500.0):
            watch.check(1.0)
            other.check(1.0)
        assert [record.getMessage() for record in caplog.records] == [
            "rank 2 slows down the others: it needs 2.000 s per step, the median rank 1.000 s (× 2.00)"
        ]
        now[0] = 1601.0
        watch.check(1.0)
        assert len(caplog.records) == 2


def test_the_peak_of_a_gpu_is_what_torch_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    assert memory_peak(torch.device("cuda")) == 1.5
