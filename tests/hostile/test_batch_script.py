"""Batch scripts with hostile names: bash runs them for real, with stand-ins for srun and Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.cluster.job import describe, parameters
from mmtrain.config import load_config, replace
from mmtrain.errors import UserError

NAMES = [
    "plain",
    "a b",
    "it's",
    'say "no"',
    "'",
    "''\"",
    "$(touch executed)",
    "`touch executed`",
    "a;touch executed;b",
    "a' ; touch executed ; '",
    "a & touch executed",
    "$HOME",
    "${x:?}",
    "*",
    "#a",
    "!a",
    "-x",
    "--",
    "ü 模型 🙂",
]

#: Every string of the section cluster that is free text.
FREE = ["partition", "account", "qos", "mem", "constraint", "exclude", "reservation", "time"]
BREAKS = ["\n", "\r", "\0", "\x1b", "\x85", "\u2028", "\udc80", "\\"]


def _script(name: str, tmp_path: Path, **cluster: object) -> str:
    config = load_config("vim2_digits", ["cluster.gpus_per_node=0"])
    config = replace(config, name=name, cluster=replace(config.cluster, **cluster))
    shown = describe(config, str(tmp_path / "runs" / name))
    return shown[shown.index("#!/bin/bash") :]


def _stand_in(file: Path, status: int) -> Path:
    """A program that writes its arguments, each with a NUL behind it, to FILE.called, and ends with ``status``."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'#!/bin/bash\nprintf \'%s\\0\' "$@" > "$0.called"\nexit {status}\n')
    file.chmod(0o755)
    return file


def _called(file: Path) -> list[str]:
    return file.with_name(f"{file.name}.called").read_text().split("\0")[:-1]


@pytest.mark.parametrize("name", NAMES)
def test_every_word_arrives_whole_and_nothing_else_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    srun, python = _stand_in(tmp_path / "bin/srun", 3), _stand_in(tmp_path / "bin/it's a $python", 7)
    monkeypatch.setattr(sys, "executable", str(python))
    script = tmp_path / "job.sh"
    script.write_text(_script(name, tmp_path, partition=name, constraint=name, replace_nodes=True, max_timeouts=2))
    assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
    here = tmp_path / "here"
    here.mkdir()
    environment = {**os.environ, "PATH": f"{srun.parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", script], cwd=here, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    run = str((tmp_path / "runs" / name).resolve())
    assert _called(srun)[-5:] == [str(python), "-u", "-m", "submitit.core._submit", f"{run}/slurm"]
    limits = ["--margin", "120", "--max-losses", "3", "--max-timeouts", "2", "--replace-nodes"]
    assert _called(python) == ["-m", "mmtrain.cluster.requeue", *limits, run, "3"]
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("key", FREE)
def test_a_character_that_ends_a_line_is_refused(key: str, tmp_path: Path) -> None:
    for character in BREAKS:
        with pytest.raises(UserError, match=rf"cluster\.{key} is .*Slurm does not accept the character"):
            _script("x", tmp_path, **{key: f"gpu{character}#SBATCH --account=other"})


def test_names_and_folders_are_held_to_the_same(tmp_path: Path) -> None:
    config = load_config("vim2_digits", ["cluster.gpus_per_node=0"])
    for character in BREAKS:
        bad = f"a{character}touch executed"
        with pytest.raises(UserError, match=r"the run folder is .*does not accept"):
            parameters(config, tmp_path / bad)
        with pytest.raises(UserError, match=r"name is .*does not accept"):
            parameters(config.model_copy(update={"name": bad}), tmp_path)
    with pytest.raises(UserError, match="without %"):
        parameters(config, tmp_path / "50%j")
