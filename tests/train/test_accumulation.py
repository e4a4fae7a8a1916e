"""How a global batch is cut: the same steps on any number of ranks, or a word on the numbers that fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare import last_checkpoint, tensors_of
from ranks_apart import run_ranks

from mmtrain.config import load_config
from mmtrain.errors import UserError
from mmtrain.train.build import micro_batches


@pytest.mark.parametrize(
    ("batch", "accumulation", "most", "world", "parts"),
    [
        (8, 1, None, 1, 1),
        (8, 1, None, 8, 1),
        (8, 1, 2, 1, 4),
        (8, 1, 2, 2, 2),
        (8, 1, 2, 4, 1),
        (8, 2, None, 2, 2),
        (8, 3, None, 1, 4),  # 3 does not divide the batch
        (12, 1, 5, 1, 3),  # pieces of 4: 5 do not divide it
    ],
)
def test_the_fewest_pieces_that_fit(
    series: Path, batch: int, accumulation: int, most: int | None, world: int, parts: int
) -> None:
    asked = (f"train.batch_size={batch}", f"train.accumulation={accumulation}")
    config = load_config(series, (*asked, f"train.micro_batch={most or 'null'}"))
    assert micro_batches(config, world) == parts


def test_a_batch_that_does_not_fit_says_which_numbers_of_ranks_do(series: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"train.batch_size=8 is not divisible by 3 ranks .*: 1, 2, 4, 8\. Or .* of 3 for .* \(6 or 9\)$",
    ):
        micro_batches(load_config(series, ("train.batch_size=8",)), 3)
    with pytest.raises(UserError, match=r"numbers of ranks: 1, 2\. Or use a multiple of 32"):
        micro_batches(load_config(series, ("train.batch_size=8", "train.accumulation=4")), 8)


@pytest.mark.slow
def test_one_rank_and_two_learn_the_same_from_pieces_of_two(series: Path, tmp_path: Path) -> None:
    options = ("train.batch_size=8", "train.micro_batch=2", "train.max_steps=5", "eval.every_steps=5")
    for world, parts in ((1, 4), (2, 2)):
        ended = run_ranks(series, tmp_path / str(world), *options, world=world)
        assert [rank.status for rank in ended] == [0] * world, ended
        assert f"using {parts} micro-batches per step instead of train.accumulation=1" in ended[0].said
    one, two = (tensors_of(last_checkpoint(tmp_path / world)) for world in "12")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)  # sums in another order


@pytest.mark.slow
def test_two_ranks_that_do_not_divide_the_batch_say_so_once(series: Path, tmp_path: Path) -> None:
    ended = run_ranks(series, tmp_path / "run", "train.batch_size=7")
    assert [rank.status for rank in ended] == [2, 2]
    assert "Possible numbers of ranks: 1, 7" in ended[0].said
    assert ended[1].said == ""
