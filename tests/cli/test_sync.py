"""``mmtrain runs sync``: which records go, as which run, and what is said when they do not."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mmtrain.cli.sync import sync_command
from mmtrain.errors import UserError

wandb = pytest.importorskip("wandb")


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """A run of two processes, ended long ago."""
    folder = tmp_path / "run"
    for name in ("offline-run-20260102_000000-abcd1234", "offline-run-20260101_000000-abcd1234"):
        part = folder / "wandb" / name
        part.mkdir(parents=True)
        (part / "run-abcd1234.wandb").touch()
        os.utime(part / "run-abcd1234.wandb", (0, 0))
    (folder / "wandb" / "run-20260103_000000-abcd1234").mkdir()  # an online one
    (folder / "config.yaml").write_text("name: run\n")
    return folder


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The calls of ``wandb sync``, which upload all but what holds a file ``refused``."""
    made: list[list[str]] = []

    real = subprocess.run

    def call(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[1:4] != ["-m", "wandb", "sync"]:  # wandb itself asks git
            return real(command, **options)
        made.append(command)
        for part in map(Path, command[4:]):
            if not (part / "refused").exists():
                (part / "run-abcd1234.wandb.synced").touch()
        return subprocess.CompletedProcess(command, 0, stdout="wandb: ERROR the server says no\n")

    monkeypatch.setattr(subprocess, "run", call)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    return made


def test_all_parts_go_in_one_call_oldest_first(
    recorded: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sync_command([recorded])
    (command,) = calls
    assert [Path(part).name for part in command[4:]] == [
        "offline-run-20260101_000000-abcd1234",
        "offline-run-20260102_000000-abcd1234",
    ]
    assert "uploading 2 offline records" in capsys.readouterr().out
    sync_command([recorded])
    assert len(calls) == 1
    assert "already been uploaded" in capsys.readouterr().out


def test_dry_run_lists_and_stops(recorded: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    sync_command([recorded], dry_run=True)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert all(line.startswith("would upload ") and line.endswith("to the W&B run abcd1234") for line in said)
    assert not calls


def test_what_could_not_be_uploaded_is_one_message(recorded: Path) -> None:
    part = recorded / "wandb" / "offline-run-20260102_000000-abcd1234"
    (part / "refused").touch()
    with pytest.raises(UserError, match=r"1 of 2 (.|\n)*20260102(.|\n)*the server says no"):
        sync_command([recorded])


def test_a_record_that_is_being_written_is_left_for_later(
    recorded: Path, calls: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    newest = recorded / "wandb" / "offline-run-20260102_000000-abcd1234" / "run-abcd1234.wandb"
    os.utime(newest, (time.time(), time.time()))
    sync_command([recorded])
    assert "still being written" in capsys.readouterr().out
    assert [Path(part).name for part in calls[0][4:]] == ["offline-run-20260101_000000-abcd1234"]
    (recorded / "result.json").write_text('{"step": 1, "test": null}')
    sync_command([recorded])
    assert len(calls) == 2


def test_what_is_no_run_and_a_missing_key_are_refused(
    recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        sync_command([tmp_path])
    wandb.teardown()  # it keeps the key that it found first
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        sync_command([recorded])
