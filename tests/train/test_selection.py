"""Which weights are measured: the averaged ones in training, those of the best checkpoint at the end; and patience."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mmtrain.config import RunConfig, load_config
from mmtrain.runs.folder import RunFolder
from mmtrain.tasks import build_task
from mmtrain.tasks.forecasting import Forecasting
from mmtrain.train.session import train
from tests.conftest import Cli
from tests.train.compare import last_checkpoint, tensors_of


def tiny(waves: Path, *overrides: str) -> RunConfig:
    tsm2 = ["model.lookback=24", "model.horizon=12", "model.dim=8", "model.depth=1", "model.dropout=0"]
    data = [
        f"data.path={waves}",
        "data.columns=null",
        "data.split=ratio",
        "train.batch_size=32",
        "threads=1",
        "tracking.plots=false",
    ]
    return load_config("tsm2_traffic", [*tsm2, *data, *overrides])


@pytest.fixture(scope="module")
def early(waves: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps whose best checkpoint is an early one: the learning rate rises until it spoils the weights."""
    folder = tmp_path_factory.mktemp("early") / "run"
    steps = ["train.max_steps=8", "eval.every_steps=2", "checkpoint.keep=1", "eval.select=best", "eval.patience=null"]
    train(tiny(waves, *steps, "optim.lr=1", "optim.warmup_epochs=99", "train.ema_decay=0.5"), folder)
    return folder


def result(run: Path) -> dict[str, object]:
    return json.loads((run / "result.json").read_text())


def test_the_best_checkpoint_stays_on_disk(early: Path) -> None:
    state = json.loads((last_checkpoint(early) / "state.json").read_text())
    assert state["best_step"] < 8
    assert (state["updates"], state["step"], state["samples"]) == (8, 8, 8 * 32)
    assert [path.name for path in sorted((early / "checkpoints").iterdir())] == [
        f"step_{state['best_step']:08d}",
        "step_00000008",
    ]


def test_the_final_test_is_of_the_best_checkpoint(early: Path, cli: Cli) -> None:
    best, last = (cli("eval", early, "--checkpoint", which) for which in ("best", "last"))
    assert result(early)["test"] == json.loads(best.stdout)
    assert json.loads(best.stdout)["mse"] < json.loads(last.stdout)["mse"]


def test_evaluations_measure_the_averaged_weights(early: Path) -> None:
    task = build_task(RunFolder(early).config())
    lines = [json.loads(line) for line in (early / "metrics.jsonl").read_text().splitlines()]
    logged = next(line["mse"] for line in lines if line["kind"] == "eval" and line["step"] == 8)
    batch = task.val.fetch(np.arange(len(task.val)), None)
    found = {}
    for part in ("average", "model"):
        model = task.build_model().eval()
        named = tensors_of(last_checkpoint(early)).items()
        model.load_state_dict({n.removeprefix(f"{part}."): t for n, t in named if n.startswith(f"{part}.")})
        with torch.no_grad():
            found[part] = (model(batch["past"]) - batch["future"]).double().square().mean().item()
    assert logged == pytest.approx(found["average"], rel=1e-5)
    assert logged != pytest.approx(found["model"], rel=1e-2)


def test_an_improvement_resets_patience(waves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([3.0, 4.0, 2.0, 5.0, 6.0, 1.0, 0.0])
    sound = Forecasting.metrics

    def scripted(self: Forecasting, sums: dict[str, float]) -> dict[str, float]:
        return {**sound(self, sums), "mse": next(results)}

    monkeypatch.setattr(Forecasting, "metrics", scripted)
    steps = ["train.max_steps=8", "eval.every_steps=1", "eval.patience=2", "checkpoint.asynchronous=false"]
    assert train(tiny(waves, *steps), tmp_path / "run").step == 5
