"""The trainer in one process: it learns, resumes exactly, says what is wrong."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmtrain.config import load_config
from mmtrain.errors import UserError
from mmtrain.inference.trained import load_trained
from mmtrain.train.checkpoint.store import verify
from mmtrain.train.loop import Outcome
from mmtrain.train.session import train
from mmtrain.train.state import TrainState

#: Nine steps with three evaluations.
NINE = ("train.max_steps=9", "eval.every_steps=3")


def run(config: Path, folder: Path, *overrides: str) -> Outcome:
    return train(load_config(config, overrides), folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_trained(folder, "last").model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_vision_run_leaves_a_whole_folder(vision: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome = run(vision, folder, "tracking.plots=true")
    assert outcome.finished
    assert outcome.test is not None
    assert outcome.test["samples"] == 359  # every sample of the held-out fifth
    there = {p.name for p in folder.iterdir()}
    assert there >= {"config.yaml", "assets.json", "code.json", "metrics.jsonl", "curves.png", "result.json", "log.txt"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    train_lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train_lines] == list(range(1, 25))
    assert train_lines[-1]["loss"] < train_lines[0]["loss"]
    assert [line["step"] for line in lines if line["kind"] == "eval" and line["split"] == "val"] == [8, 16, 24]
    assert all(line["samples_per_second"] > 0 for line in train_lines)


def test_forecasting_run_learns_the_waves(series: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcome = run(series, folder, "tracking.plots=true")
    assert outcome.test is not None
    # the waves have variance 1 after standardising, of which noise of variance 0.02 cannot be forecast
    assert outcome.test["mse"] < 0.3
    assert outcome.test["samples"] == 600 - int(600 * 0.8) - 24 + 1
    assert (folder / "forecast.png").stat().st_size > 10_000


def test_a_finished_run_is_left_alone(series: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = run(series, folder, "train.max_steps=3")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert run(series, folder, "train.max_steps=3").test == first.test
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.fixture(scope="module")
def whole(vision_in: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    run(vision_in(folder), folder / "run", "checkpoint.keep=100")
    return folder / "run"


@pytest.mark.parametrize("cut", ["checkpoint", "torn", "flipped"])
def test_resuming_gives_the_weights_of_an_unbroken_run(vision: Path, whole: Path, tmp_path: Path, cut: str) -> None:
    """From any checkpoint; past a torn or damaged one, from the one before it."""
    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    (broken / "result.json").unlink()
    for path in (broken / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > 15:
            shutil.rmtree(path)
    newest = broken / "checkpoints" / "step_00000015"
    data = next(newest.glob("*.distcp"))
    if cut == "torn":
        data.write_bytes(data.read_bytes()[:-100])
    if cut == "flipped":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(bytes(content))
    assert (verify(newest) is None) == (cut == "checkpoint")
    run(vision, broken, "checkpoint.keep=100")
    assert same(weights(whole), weights(broken))
    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 25))
    assert [line["kind"] for line in lines].count("resume") == 1


def test_accumulation_does_not_change_what_is_learnt(vision: Path, tmp_path: Path) -> None:
    for parts in (1, 4):
        run(vision, tmp_path / str(parts), f"train.accumulation={parts}", "train.max_steps=4")
    a, b = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_workers_do_not_change_what_is_learnt(vision: Path, tmp_path: Path) -> None:
    for workers in (0, 2):
        run(vision, tmp_path / str(workers), f"data.workers={workers}", "train.max_steps=4")
    assert same(weights(tmp_path / "0"), weights(tmp_path / "2"))


def test_another_seed_is_another_run(vision: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        run(vision, tmp_path / str(seed), f"seed={seed}", "train.max_steps=2")
    assert not same(weights(tmp_path / "0"), weights(tmp_path / "1"))


def test_bfloat16_trains(vision: Path, tmp_path: Path) -> None:
    outcome = run(vision, tmp_path / "run", "train.precision=bf16", "train.max_steps=3")
    assert outcome.finished
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights(tmp_path / "run").values())


def test_only_the_newest_and_the_best_checkpoints_stay(vision: Path, tmp_path: Path) -> None:
    run(
        vision,
        tmp_path / "run",
        "checkpoint.every_steps=1",
        "checkpoint.keep=2",
        "train.max_steps=9",
        "eval.every_steps=3",
    )
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    there = {int(p.name.removeprefix("step_")) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert there == {8, 9, result["tested_step"]}


def test_another_configuration_is_refused(series: Path, tmp_path: Path) -> None:
    run(series, tmp_path / "run", "train.max_steps=1")
    with pytest.raises(UserError, match=r"optim.lr: 0.003 -> 0.1(.|\n)*name="):
        run(series, tmp_path / "run", "train.max_steps=1", "optim.lr=0.1")
    assert run(series, tmp_path / "run", "train.max_steps=1", "checkpoint.keep=5").finished


def test_a_folder_that_cannot_be_written_is_refused(series: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    with pytest.raises(UserError, match="--run-dir"):
        run(series, file / "run")


def test_data_that_is_missing_leaves_no_folder(vision: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mmtrain data prepare"):
        run(vision, tmp_path / "run", "data.root=nowhere")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_says_which_fit(vision: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.batch_size=64.*multiple of 65"):
        run(vision, tmp_path / "run", "train.accumulation=65")
    with pytest.raises(UserError, match="odd"):
        run(vision, tmp_path / "run", "train.accumulation=64")


def test_gradients_that_are_not_finite_are_skipped_then_stop_the_run(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmtrain.tasks.forecasting import Forecasting

    sound = Forecasting.loss

    def sick(self, model, batch, key):  # type: ignore[no-untyped-def]
        loss = sound(self, model, batch, key)
        return loss * float("nan") if key.step in bad else loss

    monkeypatch.setattr(Forecasting, "loss", sick)
    bad = {1}
    run(series, tmp_path / "one", "train.max_steps=4")
    assert json.loads((tmp_path / "one" / "result.json").read_text())["skipped_steps"] == 1
    assert all(w.isfinite().all() for w in weights(tmp_path / "one").values())
    bad = set(range(100))
    with pytest.raises(UserError, match="3 consecutive steps"):
        run(series, tmp_path / "all", "train.max_bad_steps=3")


def test_patience_ends_a_run_early(series: Path, tmp_path: Path) -> None:
    outcome = run(series, tmp_path / "run", "eval.every_steps=1", "eval.patience=2", "optim.lr=0.5", "train.epochs=10")
    assert outcome.finished
    assert outcome.step < 100


def test_a_number_is_better_than_nan() -> None:
    state = TrainState(dataset_length=1)
    results = [(1, math.nan, True), (2, math.nan, False), (3, 0.5, True), (4, math.nan, False), (5, 0.4, False)]
    for step, value, better in results:
        state.step = step
        assert state.note_evaluation(value, higher_is_better=True) is better
    assert (state.best, state.best_step, state.evals_since_best) == (0.5, 3, 2)
