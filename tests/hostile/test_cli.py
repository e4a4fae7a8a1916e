"""Arguments, paths and streams that commands cannot use: one message, exit status 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Cli

LONG = "a" * 5000

ARGUMENTS = [
    (("train", "--config", LONG), "too long"),
    (("train", "--config", f"{LONG}.yaml"), "too long"),
    (("train", "--config", "vim2_digits", f"run_root={LONG}", "data.root=none"), ""),
    (("train", "--config", "configs"), "no such configuration"),
    (("train", "--config", "/dev/null"), "no such configuration"),
    (("train", "--config", "folder.yaml"), "no such file"),
    (("train", "--config", ""), "no such configuration"),
    (("train", "--config", "../../etc/passwd"), "no such configuration"),
    (("predict", LONG, "x.csv"), "too long"),
    (("predict", "nowhere", LONG), "nowhere"),
    (("predict", "/etc/passwd", "x.csv"), "/etc/passwd"),
    (("eval", LONG), "too long"),
    (("export", LONG, "--out", "x"), "too long"),
    (("runs", LONG), "too long"),
    (("runs", "stop", LONG), "too long"),
    (("report", LONG), "too long"),
    (("model", LONG), "too long"),
    (("model", ""), "not a run folder or export"),
    (("model", "tsm2", "depth=0x10"), "model.depth"),
    (("model", "tsm2", "depth"), "not an override"),
    (("model", "tsm2", "depth=[1"), "model.depth"),
    (("plan", "--config", "vim2_base_in1k", "--gpu", LONG), "unknown GPU"),
    (("plan", "--config", "vim2_base_in1k", "--nodes", "-1"), "--nodes -1"),
    (("plan", "--config", "vim2_base_in1k", "--nodes", "1e3"), "Invalid value"),
    (("submit", "--config", "vim2_digits", "--local", "0"), "--local 0"),
    (("submit", "--config", "vim2_digits", "--dry-run", "--name", "../x"), "below run_root"),
    (("submit", "--config", "vim2_digits", "--dry-run", "--name", "n" * 300), "at most 200 bytes"),
    (("submit", "--config", "vim2_digits", "--array-seeds", "1,x", "--dry-run"), "--array-seeds 1,x"),
    (("data", "describe", LONG), "too long"),
    (("data", "describe", "/"), "/"),
    (("data", "prepare", "images", "--root", LONG, "--out", "x"), "too long"),
    (("data", "prepare", "images", "--root", "nowhere", "--out", "x"), "nowhere"),
    (("nonsense",), "No such command"),
    (("--nonsense",), "No such option"),
]


@pytest.mark.parametrize(("arguments", "part"), ARGUMENTS, ids=[" ".join(words)[:50] for words, _ in ARGUMENTS])
def test_arguments_are_refused(arguments: tuple[str, ...], part: str, cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    done = cli(*arguments)
    assert done.returncode == 2
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 3000
    assert not list(tmp_path.glob("../x"))


def test_a_run_whose_weights_overflow_does_not_end_well(digits: Path, cli: Cli, tmp_path: Path) -> None:
    small = ["model.dims=[8,16]", "model.token_mixers=[2,2]", "model.channel_expand=[1,1]", "train.max_steps=1"]
    done = cli("train", "--config", "vim2_digits", f"data.root={digits}", *small, "optim.lr=1e38", "data.image_size=16")
    assert done.returncode == 2
    assert "the checkpoint of step 1 is unusable" in done.stderr
    assert not (tmp_path / "runs" / "vim2_digits" / "result.json").exists()


STREAMS = """
cd {folder}
{python} -m mmtrain plan --config tsm2_etth1 >/dev/full 2>full.txt; echo full $?
{python} -m mmtrain configs 2>pipe.txt | head -c 10 >/dev/null; echo pipe ${{PIPESTATUS[0]}}
LC_ALL=C PYTHONUTF8=0 PYTHONIOENCODING=ascii {python} -m mmtrain model tsm2 >ascii.txt 2>&1; echo ascii $?
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_streams_that_do_not_take_the_output(tmp_path: Path) -> None:
    script = STREAMS.format(folder=tmp_path, python=sys.executable)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    status = dict(line.split() for line in done.stdout.splitlines())
    assert status["full"] == "2"
    assert (tmp_path / "full.txt").read_text() == "error: the output: No space left on device\n"
    assert status["pipe"] in ("0", "1")
    assert (tmp_path / "pipe.txt").read_text() == ""
    assert status["ascii"] == "0"
    assert "\\xd7" in (tmp_path / "ascii.txt").read_text()
