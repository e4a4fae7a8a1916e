"""Exports, and finished runs, that were damaged or made to hang: one message, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtrain.errors import UserError
from mmtrain.inference import from_pretrained, load_trained
from mmtrain.train.checkpoint.metadata import PICKLED
from mmtrain.train.checkpoint.tensor_files import write_tensors
from mmtrain.train.state import TrainState
from tests.compat import reading
from tests.conftest import Cli
from tests.hostile.made import EXPORT, RUN, TABLE, sign


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of version 0.1.0, and a table."""
    folder = tmp_path_factory.mktemp("exported")
    reading.unpack(folder, "data", EXPORT)
    return folder


@pytest.fixture
def export(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export below the folder that ``cli`` runs in."""
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    return tmp_path / EXPORT


def _written(name: str, content: str | bytes) -> Callable[[Path], Any]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda export: (export / name).write_bytes(raw)


def _removed(name: str) -> Callable[[Path], Any]:
    return lambda export: (export / name).unlink()


def _setting(old: str, new: str) -> Callable[[Path], Any]:
    def change(export: Path) -> None:
        file = export / "config.yaml"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


def _weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(export: Path) -> None:
        file = export / "model.safetensors"
        weights = load_file(file)
        name = max(weights, key=lambda name: weights[name].numel())
        save_file(weights | {name: change(weights[name])}, file)

    return damage


def _with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(-1)[-1] = torch.nan
    return tensor


def _asset(**changes: Any) -> Callable[[Path], None]:
    def change(export: Path) -> None:
        file = export / "assets.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def _scaler(**changes: Any) -> Callable[[Path], None]:
    def change(export: Path) -> None:
        file = export / "assets.json"
        assets = json.loads(file.read_text())
        assets["scaler"].update(changes)
        file.write_text(json.dumps(assets))

    return change


#: What is done to an export, and the words of the refusal.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no assets": (_removed("assets.json"), "assets.json cannot be read"),
    "empty assets": (_written("assets.json", ""), "assets.json is damaged: it is not valid JSON"),
    "assets cut short": (_written("assets.json", '{"columns": ["a"'), "assets.json is damaged: it is not valid JSON"),
    "assets of another kind": (
        _written("assets.json", "[1]"),
        "assets.json is damaged: it does not contain a JSON object",
    ),
    "assets that are not text": (_written("assets.json", b"\xff\xfe\x00"), "assets.json is damaged"),
    "deep assets": (_written("assets.json", "[" * 100_000), "assets.json is damaged"),
    "assets without anything": (_written("assets.json", "{}"), "assets.json: the key 'lookback' is missing"),
    "assets of other types": (_asset(columns=5), "assets.json is damaged (columns: Input should be a valid list)"),
    "a look-back of another model": (
        _asset(lookback=10**12),
        "assets.json: belongs to another model, because lookback is 1000000000000 there, but 32",
    ),
    "a deviation of 0": (_scaler(std=[0.0, 1.0]), "the deviation at index 0 is 0.0"),
    "a deviation that is NaN": (_scaler(std=[1.0, float("nan")]), "the deviation at index 1 is nan"),
    "a mean that is infinite": (_scaler(mean=[float("inf"), 0.0]), "the mean at index 0 is inf"),
    "another number of means": (_scaler(mean=[0.0]), "the scaler is damaged"),
    "no configuration": (_removed("config.yaml"), "missing: config.yaml"),
    "a depth that never ends": (_setting("depth: 1", "depth: 100000000"), "model.depth"),
    "a depth of another model": (_setting("depth: 1", "depth: 1000"), "parameters do not fit"),
    "a huge width": (_setting("dim: 8", "dim: 100000000"), "parameters do not fit"),
    "a huge horizon": (_setting("horizon: 8", "horizon: 1000000000000"), "parameters do not fit"),
    "empty weights": (_written("model.safetensors", ""), "model.safetensors cannot be read"),
    "a header of 2^60 bytes": (
        _written("model.safetensors", b"\0" * 7 + b"\x10{}"),
        "model.safetensors cannot be read",
    ),
    "weights that are NaN": (_weight(_with_nan), "NaN or infinite"),
    "weights that are infinite": (_weight(lambda tensor: tensor / 0), "NaN or infinite"),
    "weights that are whole numbers": (_weight(lambda tensor: tensor.long()), "is torch.int64 in the file"),
    "weights of another shape": (_weight(lambda tensor: tensor[:1].clone()), "parameters do not fit"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_export_makes_no_forecast(name: str, export: Path, cli: Cli) -> None:
    change, said = DAMAGE[name]
    change(export)
    ended = cli("predict", EXPORT, TABLE, "--out", "forecast")
    assert ended.returncode == 2, ended
    assert said in ended.stderr
    assert EXPORT in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (export.parents[1] / "forecast").exists()


@pytest.mark.parametrize("name", ["a huge width", "weights that are NaN", "weights that are whole numbers"])
def test_from_pretrained_refuses_it_too(name: str, export: Path) -> None:
    change, said = DAMAGE[name]
    change(export)
    with pytest.raises(UserError, match=said):
        from_pretrained(export)


# ------------------------------------------------------------------ the same faults in a run


def test_a_run_with_weights_that_are_nan(checkpoint: Path, cli: Cli) -> None:
    model = load_trained(checkpoint.parents[1]).model
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    next(iter(weights.values())).view(-1)[0] = torch.nan
    (checkpoint / PICKLED).unlink()
    write_tensors(checkpoint, {"model": weights}, None)
    sign(checkpoint)
    ended = cli("predict", RUN, TABLE, "--out", "forecast")
    assert ended.returncode == 2
    assert "NaN or infinite" in ended.stderr


RUN_DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    name: DAMAGE[name] for name in ("no assets", "empty assets", "assets of another kind", "a depth that never ends")
}
RUN_DAMAGE["a huge width"] = (
    _setting("dim: 8", "dim: 100000000"),
    "does not contain the model that its configuration describes",
)


@pytest.mark.parametrize("name", RUN_DAMAGE)
@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_damaged_run_makes_no_forecast(name: str, command: str, here: Path, cli: Cli) -> None:
    change, said = RUN_DAMAGE[name]
    change(here / RUN)
    ended = cli(command, RUN, *([TABLE] if command == "predict" else []), "--out", "made")
    assert ended.returncode == 2, ended
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (here / "made").exists()


# ------------------------------------------------------------------ which checkpoint is used


@pytest.mark.parametrize("select", ["best", "last"])
def test_every_command_uses_the_checkpoint_that_was_tested(select: str, here: Path, cli: Cli) -> None:
    """``eval.select`` decides, and ``result.json`` names it; ``--checkpoint`` still takes another."""
    config = here / "config.yaml"
    shutil.move(here / RUN / "config.yaml", config)
    shutil.rmtree(here / RUN)
    # a rate far too high, so that the last checkpoint is not the best
    words = ("optim.lr=0.8", "optim.schedule=constant", "train.max_steps=12", "eval.every_steps=3")
    words += ("checkpoint.keep=9", f"eval.select={select}")
    ended = cli("train", "--config", config, "--run-dir", RUN, *words)
    assert ended.returncode == 0, ended.stderr
    result = json.loads((here / RUN / "result.json").read_text())
    best, last = TrainState.read(here / RUN / "checkpoints" / "step_00000012").best_step, 12
    assert best != last
    tested = best if select == "best" else last
    assert (result["tested_step"], result["checkpoint"]) == (tested, f"step_{tested:08d}")
    assert load_trained(here / RUN).step == tested
    assert [load_trained(here / RUN, which).step for which in ("best", "last", "9")] == [best, last, 9]
    evaluated = {which: json.loads(cli("eval", RUN, *which).stdout) for which in ((), ("--checkpoint", select))}
    for figures in evaluated.values():
        assert figures == pytest.approx(result["test"], rel=1e-5)
    (here / RUN / "result.json").unlink()  # as before the end
    assert load_trained(here / RUN).step == tested


def test_names_of_classes_of_another_model_are_refused_where_they_are_used(tmp_path: Path, cli: Cli) -> None:
    reading.unpack(tmp_path, "data", "exports/vision_safetensors")
    folder = tmp_path / "exports" / "vision_safetensors"
    _asset(classes=["a", "b"])(folder)
    assert load_trained(folder).assets["classes"] == ["a", "b"]
    ended = cli("predict", "exports/vision_safetensors", reading.IMAGES[0])
    assert ended.returncode == 2
    assert "assets.json: belongs to another model, because it names 2 classes, but the model has 4" in ended.stderr
