"""Trained weights from a folder or the hub, and what happens where they do not fit."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file
from torch import nn

from mmtrain.config import RunConfig, replace
from mmtrain.config.data import DATA
from mmtrain.config.schema import TASKS
from mmtrain.errors import UserError
from mmtrain.inference import from_pretrained, load_trained, save_pretrained
from mmtrain.models import create_model


def small(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("vim2_nano", dims=[8], token_mixers=[2], channel_expand=[2], **{"num_classes": 4, **options})


def config(model: nn.Module) -> RunConfig:
    return RunConfig(name="r", model=model.config, data=DATA["synthetic"](), task=TASKS["classification"]())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = small()
    return save_pretrained(model, config(model), {"classes": ["a", "b", "c", "d"]}, tmp_path / "saved")


def assert_weights(model: nn.Module, folder: Path, but: tuple[str, ...] = ()) -> None:
    weights = load_file(folder / "model.safetensors")
    assert set(model.state_dict()) >= set(weights) - set(but)
    for name, tensor in model.state_dict().items():
        if name not in but:
            assert torch.equal(tensor, weights[name]), name


def test_a_saved_model_comes_back(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(1)
    model = from_pretrained(folder)
    assert not model.training
    assert_weights(model, folder)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert load_trained(folder).assets == {"classes": ["a", "b", "c", "d"]}
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(model(x), small().eval()(x))


def test_another_head_starts_fresh_and_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = from_pretrained(folder, num_classes=7)
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 7)
    assert_weights(model, folder, but=("head.weight", "head.bias"))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "head.bias, head.weight" in warnings[0] or "head.weight, head.bias" in warnings[0]
    # what the head does not touch may change without a word
    assert from_pretrained(folder, drop_path=0.2).config.drop_path == 0.2


def test_saving_a_model_with_another_head_saves_its_configuration(folder: Path, tmp_path: Path) -> None:
    model = from_pretrained(folder, num_classes=7)
    again = from_pretrained(save_pretrained(model, config(small()), {}, tmp_path / "tuned"))
    assert again.config.num_classes == 7
    with pytest.raises(UserError, match="tuned already exists"):
        save_pretrained(model, config(model), {}, tmp_path / "tuned")


def test_the_head_of_a_forecaster_is_its_maps_to_the_horizon(tmp_path: Path) -> None:
    model = create_model("tsm2", lookback=32, horizon=8, dim=4, depth=1, linear_path=True)
    run = replace(config(small()), model=model.config, data=DATA["series"](), task=TASKS["forecasting"]())
    saved = save_pretrained(model, run, {}, tmp_path / "saved")
    longer = from_pretrained(saved, horizon=24, output="quantiles")
    heads = ("head.weight", "head.bias", "linear.weight", "linear.bias", "spread.weight", "spread.bias")
    assert_weights(longer, saved, but=heads)
    assert longer(torch.randn(1, 32, 2)).shape == (1, 24, 2)
    with pytest.raises(ValueError, match=r"embed\.weight \(file \(4, 16\), model \(6, 16\)\).*Of dim, leave out"):
        from_pretrained(saved, dim=6)


def test_other_mismatches_list_keys_and_shapes(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"stem\.weight \(file \(8, 3, 2, 2\), model \(8, 1, 2, 2\)\).*in_channels"):
        from_pretrained(folder, in_channels=1)
    with pytest.raises(ValueError, match=r"\d+ parameters do not fit: .*A_log.* and \d+ more"):
        from_pretrained(folder, state=8)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"extra": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"extra \(file \(2,\), model none\).*export the model again"):
        from_pretrained(folder)
    del weights["head.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"head\.bias \(file none, model \(4,\)\)"):
        from_pretrained(folder)
    with pytest.raises(UserError, match=r"num_clases.*did you mean 'num_classes'"):
        from_pretrained(folder, num_clases=3)


def test_what_is_no_model_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither an existing folder nor the id"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"missing: model\.safetensors, config\.yaml"):
        from_pretrained(tmp_path)
    with pytest.raises(UserError, match="revision='v1' applies to the hub"):
        from_pretrained(folder, revision="v1")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        from_pretrained(folder)


def test_a_hub_id_fetches_three_files_of_a_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = from_pretrained("someone/vim2-digits", revision="v1", num_classes=2)
    assert_weights(model, folder, but=("head.weight", "head.bias"))
    names = ["model.safetensors", "config.yaml", "assets.json"]
    assert asked == [("someone/vim2-digits", {"revision": "v1", "allow_patterns": names})]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no net"), OfflineModeIsEnabled("off")])
def test_without_the_hub_the_cure_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"cannot be reached.*hf download someone/model"):
        from_pretrained("someone/model")


def test_without_the_hub_library_the_cure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        from_pretrained("someone/model")


def test_a_repository_without_a_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets.json").write_text(json.dumps({}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match="someone/model: contains no mmtrain model"):
        from_pretrained("someone/model")
