"""Where the lines of a run go: one W&B run over restarts, TensorBoard, and no secrets. None of it stops a training."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from faults import Kill
from ranks_apart import run_ranks

from mmtrain.config import load_config
from mmtrain.errors import UserError
from mmtrain.runs import folder as run_folder
from mmtrain.runs.folder import LIMIT, code_diff
from mmtrain.tasks.forecasting import Forecasting
from mmtrain.train.loop import Outcome
from mmtrain.train.session import train

SHORT = ("train.max_steps=6", "eval.every_steps=2", "train.log_every=1", "tracking.plots=false")


def run(config: Path, folder: Path, *overrides: str) -> Outcome:
    return train(load_config(config, (*SHORT, *overrides)), folder)


def cut_back(folder: Path, step: int) -> None:
    """Make ``folder`` look as if its run had been killed after the checkpoint of ``step``, having gone on a little."""
    (folder / "result.json").unlink()
    for path in (folder / "checkpoints").iterdir():
        if path.name != f"step_{step:08d}":
            shutil.rmtree(path)


def parts(folder: Path) -> list[str]:
    """The ids of the offline W&B records of ``folder``."""
    return [path.name.rsplit("-", 1)[1] for path in sorted((folder / "wandb").glob("offline-run-*"))]


def forget_key() -> None:
    """Let W&B look at the environment again: it keeps what it found first."""
    if importlib.util.find_spec("wandb"):
        import wandb

        try:
            wandb.teardown()
        except ConnectionError:  # its service was killed with the process group of an earlier test
            wandb.teardown()  # the first call dropped the connection; this one forgets the rest


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No key of whoever runs the tests, and no pictures, which take a second each."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    forget_key()
    monkeypatch.setattr(Forecasting, "illustrate", lambda *_: [])


class Recorded:
    """Stands in for a W&B run."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.saved: list[str] = []
        self.dir = ""

    def init(self, **options: Any) -> Recorded:
        self.started.append(options)
        self.dir = str(Path(options["dir"]) / "wandb")
        Path(self.dir).mkdir(exist_ok=True)
        return self

    def define_metric(self, *_: object, **__: object) -> None: ...

    def finish(self) -> None: ...

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def save(self, path: str, **_: object) -> None:
        self.saved.append(Path(path).name)


@pytest.fixture
def wandb_run(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    wandb = pytest.importorskip("wandb")
    recorded = Recorded()
    monkeypatch.setattr(wandb, "init", recorded.init)
    return recorded


# ---------------------------------------------------------------------- W&B


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_keeps_its_wandb_id(series: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    options = (*SHORT, "tracking.wandb=offline")
    ended = run_ranks(series, folder, *options, world=1, fault=Kill(0, step=1))
    assert ended[0].status == -9, ended
    assert not list((folder / "checkpoints").glob("step_*"))
    for world in (1, 2):  # from nothing, and from a checkpoint
        ended = run_ranks(series, folder, *options, world=world)
        assert {rank.status for rank in ended} == {0}, ended
        state = json.loads((folder / "checkpoints" / "step_00000004" / "state.json").read_text())
        assert state["tracker_id"] == (folder / "wandb_id.txt").read_text().strip()
        cut_back(folder, 4)
    assert len(parts(folder)) == 3  # one a start, none of rank 1
    assert set(parts(folder)) == {state["tracker_id"]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert not list((folder / "wandb").rglob("diff.patch"))  # W&B's own would hold secrets


def test_the_id_in_the_checkpoint_is_used_where_the_file_is_lost(
    series: Path, tmp_path: Path, wandb_run: Recorded
) -> None:
    folder = tmp_path / "run"
    run(series, folder, "tracking.wandb=offline")
    cut_back(folder, 4)
    (folder / "wandb_id.txt").unlink()
    run(series, folder, "tracking.wandb=offline")
    first, second = wandb_run.started
    assert first["id"] == second["id"] == (folder / "wandb_id.txt").read_text().strip()


def test_what_wandb_is_told(series: Path, tmp_path: Path, wandb_run: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(run_folder, "code_diff", lambda root: "a diff")
    folder = tmp_path / "run"
    run(series, folder, "tracking.wandb=online", "name=waves")
    cut_back(folder, 4)
    run(series, folder, "tracking.wandb=online", "name=waves")
    cut_back(folder, 4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "7")
    run(series, folder, "tracking.wandb=online", "name=waves", "tracking.group=sines")
    told = wandb_run.started
    assert [options["job_type"] for options in told] == ["restart 0", "restart 1", "restart 7"]
    assert [options["group"] for options in told] == ["waves", "waves", "sines"]
    assert [options["resume"] for options in told] == ["allow", "must", "must"]
    assert {options["mode"] for options in told} == {"online"}
    assert told[0]["config"]["optim"]["lr"] == 3e-3
    assert wandb_run.saved == ["code.json", "code.diff"] * 3
    rows = [row for row in wandb_run.rows if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 5, 6, 5, 6]
    assert all({"train/averaging_alpha", "train/averaging_theta"} <= row.keys() for row in rows)
    assert any("val/mse" in row for row in wandb_run.rows)


def test_online_after_offline_does_not_ask_for_a_run_that_the_server_never_saw(
    series: Path, tmp_path: Path, wandb_run: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    folder = tmp_path / "run"
    run(series, folder, "tracking.wandb=offline")
    cut_back(folder, 4)
    run(series, folder, "tracking.wandb=online")
    assert [options["resume"] for options in wandb_run.started] == ["allow", "allow"]


def test_pictures_reach_wandb(
    series: Path, tmp_path: Path, wandb_run: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def illustrate(self: Forecasting, model: object, folder: Path) -> list[Path]:
        from PIL import Image

        Image.new("RGB", (8, 8)).save(folder / "forecast.png")
        return [folder / "forecast.png"]

    monkeypatch.setattr(Forecasting, "illustrate", illustrate)
    outcome = run(series, tmp_path / "run", "tracking.wandb=offline", "tracking.plots=true")
    (row,) = [row for row in wandb_run.rows if "forecast" in row]
    assert type(row["forecast"]).__name__ == "Image"
    assert 0 < row["step"] <= outcome.step


def test_without_a_key_the_run_is_recorded_offline_and_says_so_once(
    series: Path, tmp_path: Path, wandb_run: Recorded, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mmtrain"):
        assert run(series, tmp_path / "run", "tracking.wandb=online").finished
    assert [options["mode"] for options in wandb_run.started] == ["offline"]
    (said,) = [record.message for record in caplog.records if "W&B" in record.message]
    assert "WANDB_API_KEY" in said
    assert f"mmtrain runs sync {tmp_path / 'run'}" in said


def test_a_key_in_the_netrc_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from mmtrain.train.trackers.sinks import has_wandb_key

    assert not has_wandb_key()
    file = tmp_path / "netrc"
    file.write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    assert has_wandb_key()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_wandb_that_fails_is_said_once_and_the_run_goes_on(
    series: Path,
    tmp_path: Path,
    wandb_run: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    if where == "init":
        monkeypatch.setattr("wandb.init", fail)
    else:
        monkeypatch.setattr(wandb_run, where, fail)
    assert run(series, tmp_path / "run", "tracking.wandb=offline").finished
    (said,) = [record.message for record in caplog.records if "no network" in record.message]
    assert "metrics.jsonl is complete" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]


# ---------------------------------------------------------------------- TensorBoard


def test_tensorboard_shows_no_step_twice_after_a_restart(series: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    run(series, folder, "tracking.tensorboard=true")
    cut_back(folder, 4)
    run(series, folder, "tracking.tensorboard=true")
    assert len(list((folder / "tensorboard").glob("events.out.tfevents.*"))) == 2
    shown = EventAccumulator(str(folder / "tensorboard"))
    shown.Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    scalars = shown.Scalars("train/loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in scalars] == pytest.approx([losses[event.step] for event in scalars])
    assert [event.step for event in shown.Scalars("val/mse")] == [2, 4, 6]
    assert {"test/mse", "train/averaging_alpha"} <= set(shown.Tags()["scalars"])


def test_tensorboard_hides_what_a_rollback_took_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mmtrain.train.trackers.sinks import TensorBoard

    board = TensorBoard(tmp_path / "tensorboard", 0)
    for step in (1, 2, 3):
        board.log({"kind": "train", "step": step, "loss": 1.0})
    board.log({"kind": "rollback", "step": 1, "from_step": 3, "loss": 9.0})
    board.log({"kind": "train", "step": 2, "loss": 2.0})
    board.finish()
    assert not board.failed
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train/loss")] == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize(("name", "option"), [("wandb", "wandb=offline"), ("tensorboard", "tensorboard=true")])
def test_a_missing_package_is_said_before_anything_is_made(
    series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, option: str
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked, *rest: None if asked == name else there(asked, *rest)
    )
    with pytest.raises(UserError, match=rf"pip install 'mmtrain\[{name}\]'"):
        run(series, tmp_path / "run", f"tracking.{option}")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- the code


def git(root: Path, *words: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    subprocess.run(["git", "-C", root, *identity, *words], check=True, capture_output=True)


def test_the_diff_of_the_code_leaves_secrets_out(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    hidden = (".env", "conf/prod.env", "api_key.txt", "My_Secret.py", "tokens/all.txt", "old_key.py", "id.pem")
    for name in (*hidden, "model.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("before\n")
    git(root, "init", "-q")
    assert code_diff(root) is None  # no commit yet
    git(root, "add", "-A")
    git(root, "commit", "-qm", "all")
    assert code_diff(root) is None  # no change
    for name in hidden:
        (root / name).write_text("hush\n")
    (root / "model.py").write_text("after\n")
    git(root, "mv", "-f", "old_key.py", "old_key_renamed.py")
    diff = code_diff(root)
    assert diff is not None
    assert "+after" in diff
    assert "hush" not in diff
    assert not any(name in diff for name in hidden)
    (root / "model.py").write_text("x" * 79 + "\n" + ("y" * 79 + "\n") * (LIMIT // 40))
    cut = code_diff(root)
    assert cut is not None
    assert LIMIT < len(cut) < LIMIT + 100
    assert "truncated" in cut
    assert code_diff(tmp_path / "elsewhere") is None


def test_the_diff_is_in_the_run_folder(series: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "code_diff", lambda root: "a diff")
    run(series, tmp_path / "run", "train.max_steps=1")
    assert (tmp_path / "run" / "code.diff").read_text() == "a diff"
