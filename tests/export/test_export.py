"""Exported files compute what the model does, for any batch, and are whole or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtrain import export
from mmtrain.config import RunConfig, to_yaml
from mmtrain.config.data import DATA, DataConfig
from mmtrain.config.schema import TASKS
from mmtrain.errors import UserError
from mmtrain.export import example_input, export_onnx, export_torch, export_trained
from mmtrain.inference.trained import TrainedModel, load_trained
from mmtrain.models import create_model

TINY_VIM2: dict[str, Any] = {"dims": [8], "token_mixers": [2], "channel_expand": [2], "num_classes": 4, "state": 4}
TINY_TSM2: dict[str, Any] = {"lookback": 32, "horizon": 8, "dim": 4, "depth": 1, "state": 4}


def tiny(family: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if family == "vim2":
        return create_model("vim2_nano", **TINY_VIM2), torch.randn(2, 3, 8, 8)
    return create_model("tsm2", **TINY_TSM2), torch.randn(2, 32, 3)


def write_run(model: Any, data: DataConfig, folder: Path) -> TrainedModel:
    """The files of a run of ``model`` that an export reads."""
    folder.mkdir()
    config = RunConfig(name="r", model=model.config, data=data, task=TASKS["forecasting"]())
    assets = {"columns": ["a", "b", "c"], "lookback": 32, "horizon": 8}
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "assets.json").write_text(json.dumps(assets))
    return TrainedModel(model, config, assets, folder, None)


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    return model.eval()(x)


@pytest.mark.slow
def test_a_torch_program_equals_the_model_for_any_batch_and_needs_torch_alone(tmp_path: Path) -> None:
    model, x = tiny("tsm2")
    model.train()
    made = export_torch(model, x[:1], tmp_path / "model.pt2")
    assert model.training
    assert made.path.stat().st_size
    loaded = torch.export.load(made.path)
    assert loaded.example_inputs is None
    targets = {str(node.target) for node in loaded.graph.nodes if node.op == "call_function"}
    assert all(target.startswith("aten.") or "built-in function" in target for target in targets)
    run = loaded.module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(run(x), answer(model, x), rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    torch.save({"x": x, "y": answer(model, x)}, tmp_path / "case.pt")
    program = """
import sys, torch
case = torch.load("case.pt", weights_only=True)
y = torch.export.load("model.pt2").module()(case["x"])
torch.testing.assert_close(y, case["y"], rtol=1e-4, atol=1e-5)
assert not [name for name in sys.modules if name.startswith("mmtrain")]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vim2", "tsm2"])
def test_an_onnx_graph_equals_the_model_for_any_batch(family: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = tiny(family)
    made = export_onnx(model, x[:1], tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[0]) for i in session.get_inputs()] == [("x" if family == "vim2" else "past", "batch")]
    assert [o.name for o in session.get_outputs()] == ["output"]
    for batch in (1, 2, 5):
        x = torch.randn(batch, *x.shape[1:])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), answer(model, x), rtol=1e-4, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    content = made.path.read_bytes()
    assert not [trace for trace in (b"site-packages", b"mmtrain", str(tmp_path).encode()) if trace in content]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vim2_nano", "tsm2"])
def test_the_named_sizes_export_as_they_are(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name)
    x = torch.randn(2, 3, 8, 8) if name == "vim2_nano" else torch.randn(2, 512, 7)
    made = export_torch(model, x, tmp_path / "model.pt2")
    assert made.error <= export.TOLERANCE * max(1, answer(model, x).abs().max().item())


@pytest.mark.slow
def test_auxiliary_inputs_are_exported_for_any_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("tsm2", **TINY_TSM2, static_features=2)
    past, static = torch.randn(2, 32, 3), torch.randn(2, 3, 2)
    export_torch(model, (past, None, static), tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    for batch in (1, 2):
        with torch.no_grad():
            expected = model.eval()(past[:batch], None, static[:batch])
            torch.testing.assert_close(run(past[:batch], None, static[:batch]), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_was_trained_on_holes_takes_a_mask(trained: TrainedModel) -> None:
    assert [x.dtype for x in example_input(trained)] == [torch.float32]
    trained.config = trained.config.model_copy(update={"data": DATA["series"](missing="mask")})
    past, mask = example_input(trained)
    assert (past.dtype, mask.dtype, mask.shape) == (torch.float32, torch.bool, past.shape)
    assert 0.7 < mask.float().mean() < 0.9


@pytest.mark.parametrize("kind", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_holes_are_forecast_as_mmtrain_does(kind: str, tmp_path: Path) -> None:
    """The mask is an input of the file, and what stands in a hole does not matter."""
    torch.manual_seed(0)
    model = create_model("tsm2", **TINY_TSM2, mask_input=True).eval()
    out = export_trained(write_run(model, DATA["series"](), tmp_path / "run"), tmp_path / "out", kind)
    past = torch.randn(3, 32, 3)
    mask = torch.rand(past.shape) < 0.7
    with torch.no_grad():
        expected = model(past, mask)
        assert (expected - model(past)).abs().max() > 0.01
    for hole in (0.0, torch.nan):
        given = past.masked_fill(~mask, hole)
        if kind == "torch":
            found = torch.export.load(out / "model.pt2").module()(given, mask)
        else:
            onnxruntime = pytest.importorskip("onnxruntime")
            session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
            (array,) = session.run(None, {"past": given.numpy(), "mask": mask.numpy()})
            found = torch.from_numpy(array)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Doubling(nn.Module):
    """Computes something else while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.compiler.is_exporting() else x * 2.001


class Holes(nn.Module):
    """NaN while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan") if torch.compiler.is_exporting() else x


@pytest.mark.parametrize("wrong", [Doubling, Holes])
def test_a_file_that_computes_something_else_is_not_written(wrong: type[nn.Module], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="differs from the original by"):
        export_torch(wrong(), torch.ones(2, 3), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_bad_targets_and_examples_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "model.pt2"
    there.write_text("mine")
    model, x = nn.Identity(), torch.ones(2, 3)
    with pytest.raises(UserError, match=r"model\.pt2 already exists"):
        export_torch(model, x, there)
    assert there.read_text() == "mine"
    with pytest.raises(UserError, match=r"must end in \.pt2"):
        export_torch(model, x, tmp_path / "model.onnx")
    with pytest.raises(UserError, match="cannot be written"):
        export_torch(model, x, there / "inside.pt2")
    for example in ((x, torch.ones(3, 3)), torch.ones(()), (None,), torch.ones(0, 3)):
        with pytest.raises(UserError, match="Dimension 0"):
            export_torch(model, example, tmp_path / "new.pt2")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"needs onnxscript, .*pip install 'mmtrain\[export\]'"):
        export_onnx(model, x, tmp_path / "new.onnx")


@pytest.fixture
def trained(tmp_path: Path) -> TrainedModel:
    """An untrained TSM2 as a run leaves it."""
    torch.manual_seed(0)
    model = create_model("tsm2", **TINY_TSM2).eval()
    return write_run(model, DATA["series"](), tmp_path / "run")


@pytest.mark.parametrize("kind", ["safetensors", "torch", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_trained_model_is_exported_with_what_it_needs(kind: str, trained: TrainedModel, tmp_path: Path) -> None:
    out = export_trained(trained, tmp_path / "out", kind)
    name = {"safetensors": "model.safetensors", "torch": "model.pt2", "onnx": "model.onnx"}[kind]
    assert sorted(p.name for p in out.iterdir()) == ["assets.json", "config.yaml", name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]
    x = torch.randn(3, 32, 3)
    if kind == "torch":
        torch.testing.assert_close(torch.export.load(out / name).module()(x), answer(trained.model, x))
    if kind == "safetensors":
        torch.testing.assert_close(answer(load_trained(out).model, x), answer(trained.model, x))
    with pytest.raises(UserError, match="out already exists"):
        export_trained(trained, out, kind)


def test_an_unknown_format_is_named(trained: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--format onx: .*did you mean 'onnx'"):
        export_trained(trained, tmp_path / "out", "onx")
