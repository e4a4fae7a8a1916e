"""Checkpoints whose small files were damaged, even with a manifest that fits; copies beside them; other settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config import load_config, to_yaml
from mmtrain.errors import UserError
from mmtrain.inference import load_trained
from mmtrain.runs.folder import checkpoints_in, newest_step
from mmtrain.train.checkpoint.metadata import PICKLED
from mmtrain.train.state import TrainState
from tests.conftest import Cli
from tests.hostile.made import RUN, TABLE, USES, sign

# ------------------------------------------------------------------ small files that are damaged


def _without(*names: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        for name in names:
            (checkpoint / name).unlink()
        sign(checkpoint)

    return change


def _manifest(content: str) -> Callable[[Path], Any]:
    return lambda checkpoint: (checkpoint / "manifest.json").write_text(content)


def _named_too(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        file = checkpoint / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: {"size": 0, "sha256": ""}}))

    return change


def _not_named(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        file = checkpoint / "manifest.json"
        file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != name}))

    return change


#: What makes a checkpoint count as damaged: the one before it is used, and the fault is told.
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty manifest": (_manifest("{}"), "does not name state.json"),
    "a manifest that is none": (_manifest("[]"), "does not name state.json"),
    "a manifest of a number": (_manifest("5"), "manifest.json cannot be read"),
    "a deep manifest": (_manifest("[" * 100_000), "manifest.json cannot be read"),
    "entries that are none": (_manifest('{"state.json": 1, "config.yaml": 1, ".metadata": 1}'), "cannot be read"),
    "no state": (_without("state.json"), "does not name state.json"),
    "no configuration": (_without("config.yaml"), "does not name config.yaml"),
    "no index": (_without(PICKLED), "does not name tensors.json"),
    "a file of tensors that is not listed": (_not_named("__0_0.distcp"), "does not name __0_0.distcp"),
    "a file elsewhere": (_named_too("/dev/zero"), "'/dev/zero', which is not a file of a checkpoint"),
    "a file above": (_named_too("../../config.yaml"), "'../../config.yaml', which is not a file of a checkpoint"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_passed_over(
    name: str, here: Path, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, said = DAMAGED[name]
    change(checkpoint)
    with pytest.raises(UserError, match="there is no checkpoint yet"):  # it was the only one
        load_trained(here / RUN)
    assert said in caplog.text
    assert f"{checkpoint} is not used" in caplog.text


def _state(**changes: Any) -> str:
    return json.dumps({"step": 4, "samples": 64} | changes)


#: What a state may hold, and the words of the refusal.
STATES = {
    "": "it is not valid JSON",
    "[]": "it does not contain a JSON object",
    "null": "it does not contain a JSON object",
    "{}": "it names step None",
    "[" * 100_000: "it is not valid JSON",
    _state(step=-4): "step: Input should be greater than or equal to 0",
    _state(step="4"): "step: Input should be a valid integer",
    _state(step=None): "step: Input should be a valid integer",
    _state(step=5): "it names step 5",
    _state(step=10**30): "it names step 1000000000000",
    _state(samples=-1): "samples: Input should be greater",
    _state(samples=[1]): "samples: Input should be a valid integer",
    _state(best_step="x"): "best_step: Input should be a valid integer",
    _state(best="x"): "best: Input should be a valid number",
    _state(loss_scale=0): "loss_scale: Input should be greater than 0",
    _state(recent_losses=5): "recent_losses: Input should be a valid",
    _state(data=[]): "data: Input should be",
    _state(unknown=1): "another version of mmtrain",
}


@pytest.mark.parametrize("content", STATES, ids=lambda content: content[:40])
def test_a_state_that_cannot_be(content: str, checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text(content)
    with pytest.raises(UserError, match=STATES[content]) as refused:
        TrainState.read(checkpoint)
    assert str(checkpoint) in str(refused.value)


@pytest.mark.parametrize("use", USES)
def test_a_damaged_state_is_one_message(use: str, checkpoint: Path, cli: Cli) -> None:
    (checkpoint / "state.json").write_text(_state(step=-4))
    sign(checkpoint)
    ended = cli(*USES[use])
    assert ended.returncode == 2
    assert "state.json is damaged (step: Input should be greater than or equal to 0)" in ended.stderr
    assert "Traceback" not in ended.stderr


RESULTS = {
    "": "not valid JSON",
    "[]": "not contain a JSON object",
    "{}": "no step",
    '{"step": "x", "test": {}}': "no step",
}


@pytest.mark.parametrize("content", RESULTS)
@pytest.mark.parametrize("use", ["predict", "resume"])
def test_a_damaged_result(use: str, content: str, here: Path, cli: Cli) -> None:
    (here / RUN / "result.json").write_text(content)
    ended = cli(*USES[use])
    assert ended.returncode == 2
    assert "result.json is damaged" in ended.stderr
    assert RESULTS[content] in ended.stderr
    assert "delete it" in ended.stderr


def test_copies_beside_the_checkpoints_are_left_alone(here: Path, checkpoint: Path, cli: Cli) -> None:
    """The run goes on to its end past them, and none is read or deleted."""
    others = ["step_00000020.bak", "step_abc", "step_20", "step_000000099", "mine.partial", "step_00000099 (copy)"]
    for name in others:
        shutil.copytree(checkpoint, checkpoint.parent / name)
    (checkpoint.parent / "step_00000098").write_text("a file")
    ended = cli(*USES["resume"])
    assert ended.returncode == 0, ended.stderr
    assert "resuming at step 4 of 16" in ended.stderr
    there = {path.name for path in checkpoint.parent.iterdir()}
    assert {*others, "step_00000098"} <= there
    steps = checkpoints_in(checkpoint.parent)
    assert max(steps) == newest_step(here / RUN) == 16
    assert not {20, 98, 99} & set(steps)


@pytest.mark.parametrize("change", ["optim.lr=0.1", "seed=9", "optim.weight_decay=0.3"])
@pytest.mark.parametrize("gone", [True, False])
def test_a_resume_keeps_to_the_configuration_of_the_checkpoint(
    change: str, gone: bool, here: Path, checkpoint: Path, cli: Cli
) -> None:
    """Also where the run folder's own copy was deleted, or edited."""
    file = here / RUN / "config.yaml"
    shutil.copy(file, here / "mine.yaml")
    if gone:
        file.unlink()
    else:
        changed = load_config(file, [change])
        file.write_text(to_yaml(changed))
    ended = cli("train", "--config", "mine.yaml", "--run-dir", RUN, change)
    assert ended.returncode == 2
    assert f"{checkpoint.relative_to(here)}/config.yaml) contains a run with another configuration" in ended.stderr
    assert change.split("=")[0] in ended.stderr
    assert file.exists() is not gone


@pytest.mark.parametrize("step", ["²", "x", "-1", "1" * 5000, "", "1.5", "٣"])
def test_a_checkpoint_that_is_no_step(step: str, here: Path, cli: Cli) -> None:
    ended = cli("predict", RUN, TABLE, "--checkpoint", step)
    assert ended.returncode == 2
    assert "choose selected, best, last or a step" in ended.stderr


def test_a_checkpoint_that_is_not_there(here: Path, cli: Cli) -> None:
    ended = cli("predict", RUN, TABLE, "--checkpoint", "999999999999")
    assert ended.returncode == 2
    assert "step_999999999999 cannot be used" in ended.stderr
    assert "available: step_00000004" in ended.stderr
