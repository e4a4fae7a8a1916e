"""A model, a task and a data source, each one file dropped into its package and named in no other place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mmtrain.data
import mmtrain.models
import mmtrain.tasks
from mmtrain.config import DATA, MODELS, TASKS, load_config
from mmtrain.config.registry import Registry
from mmtrain.errors import UserError
from mmtrain.models import build_model, create_model, list_models
from mmtrain.tasks import build_task
from tests.conftest import ROOT

MODEL = """
from pydantic import Field
from torch import Tensor, nn

from mmtrain.config import MODELS, ImageModelConfig


@MODELS.section("toy_model", toy_wide={"width": 8})
class ToyConfig(ImageModelConfig):
    width: int = Field(2, ge=1, description="Features.")


@MODELS.implements(ToyConfig)
class Toy(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.features = nn.Linear(config.in_channels, config.width)
        self.head = nn.Linear(config.width, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.mean((2, 3))))
"""
DATA_SOURCE = """
from mmtrain.config import DATA, ImageDataConfig
from mmtrain.data.images.synthetic import SyntheticImages
from mmtrain.data.open import Images


@DATA.section("toy_data")
class ToyDataConfig(ImageDataConfig):
    kind: str = "toy_data"


@DATA.implements(ToyDataConfig)
def open_toys(data: ToyDataConfig, num_classes: int, seed: int) -> Images:
    source = SyntheticImages(num_classes, data.image_size, 16, seed=seed)
    return Images(source, source, None, None)
"""
TASK = """
from mmtrain.config import TASKS, ClassificationConfig
from mmtrain.tasks.classification import Classification


@TASKS.section("toy_task")
class ToyTaskConfig(ClassificationConfig):
    kind: str = "toy_task"


@TASKS.implements(ToyTaskConfig)
class ToyTask(Classification):
    pass
"""
CONFIG = """
model: {name: toy_wide, num_classes: 3}
data: {kind: toy_data, image_size: 8}
task: {kind: toy_task}
"""
FILES = {"models": MODEL, "data": DATA_SOURCE, "tasks": TASK}


def drop_in(folder: Path) -> None:
    """Write the three files below ``folder``, each in the folder of its package, and a configuration."""
    for package, text in FILES.items():
        (folder / package).mkdir()
        (folder / package / f"toy_{package}.py").write_text(text)
    (folder / "toy.yaml").write_text(CONFIG)


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    drop_in(tmp_path)
    registries: tuple[Registry, ...] = (MODELS, DATA, TASKS)
    for package, registry in zip((mmtrain.models, mmtrain.data, mmtrain.tasks), registries, strict=True):
        name = package.__name__.rpartition(".")[2]
        registry.discover()
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / name)])
        monkeypatch.setattr(registry, "_complete", False)
        for table in ("_sections", "_presets", "_implementations"):
            monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    yield tmp_path / "toy.yaml"
    for package in FILES:
        sys.modules.pop(f"mmtrain.{package}.toy_{package}", None)


def test_three_files_are_a_run(toys: Path) -> None:
    config = load_config(toys, ["model.width=4"])
    assert (config.model.name, config.data.kind, config.task.kind) == ("toy_wide", "toy_data", "toy_task")
    task = build_task(config)
    batch = task.train.fetch(torch.arange(4).numpy(), None)
    assert build_model(config.model)(batch["image"]).shape == (4, 3)
    assert type(task).__name__ == "ToyTask"
    assert task.build_model().features.out_features == 4


def test_new_names_are_listed_and_checked_like_the_others(toys: Path) -> None:
    assert {"toy_model", "toy_wide", "vim2_tiny"} <= set(list_models())
    assert create_model("toy_wide", num_classes=2).features.out_features == 8
    with pytest.raises(UserError, match="did you mean 'toy_wide'"):
        load_config(toys, ["model=toy_wid"])
    with pytest.raises(UserError, match=r"unknown key 'model\.widht'; did you mean 'model\.width'"):
        load_config(toys, ["model.widht=3"])
    with pytest.raises(UserError, match=r"command line: model\.width=0: must be at least 1"):
        load_config(toys, ["model.width=0"])
    with pytest.raises(UserError, match=r"known: .*toy_data"):
        load_config(toys, ["data=tape"])


def test_the_planner_says_what_it_does_not_know(toys: Path) -> None:
    from mmtrain.plan import plan_run

    with pytest.raises(UserError, match=r"data\.kind=toy_data: the plan supports shards"):
        plan_run(load_config(toys), 1, 1, "h100")
    assert plan_run(load_config(toys, ["data=synthetic"]), 1, 1, "h100").config.model.name == "toy_wide"


def test_the_model_command_knows_the_file(tmp_path: Path) -> None:
    drop_in(tmp_path)
    code = """
import sys, mmtrain.models
from mmtrain.cli import main

mmtrain.models.__path__.append(sys.argv[1])
for name in ("toy_model", "toy_modle"):
    sys.argv = ["mmtrain", "model", name]
    try:
        main()
    except SystemExit as end:
        print(f"{name} ended with {end.code}")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "models")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    shown, _, ended = done.stdout.partition("toy_model ended with 0\n")
    assert "toy_model" in shown, done.stderr
    assert ended == "toy_modle ended with 2\n"
    assert "toy_model" in done.stderr


def test_built_in_names_need_no_torch() -> None:
    code = (
        "import sys; from mmtrain.config import config_names, load_config;"
        "[load_config(name) for name in config_names()]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
