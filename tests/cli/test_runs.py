"""``mmtrain runs``: the table, stopping a run, reading its logs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmtrain.runs import logs
from mmtrain.runs.status import run_statuses
from mmtrain.runs.table import COLUMNS, span, table
from tests.cluster.made import BEGIN, HERE, make_run, noted
from tests.conftest import ROOT, Cli, Done, cpu_seconds


def refused(done: Done, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose command line names mmtrain."""
    code = "import sys, time; sys.stdout.write('.'); sys.stdout.flush(); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-S", "-c", code, "mmtrain"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        yield process
        process.kill()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs that stand in for Slurm's: squeue shows the file ``queue``, scancel notes its words in ``cancelled``."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (tmp_path / "queue").touch()
    programs = {"sbatch": "true", "squeue": f"cat {tmp_path}/queue", "scancel": f'echo "$@" >> {tmp_path}/cancelled'}
    for name, body in programs.items():
        (bin / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    return tmp_path


# ---------------------------------------------------------------- the table


def test_list_is_what_runs_does_by_itself(cli: Cli, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "digits")
    make_run(tmp_path / "others" / "series", config="tsm2_traffic")
    for words in ((), ("list",), ("runs",), ("list", "runs"), ("watch", "--once"), ("watch", "runs", "--once")):
        done = cli("runs", *words)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0].split() == " ".join(COLUMNS).split()
        assert lines[1].split()[:4] == ["runs/digits", "vim2_nano", "unfinished", "10/30"]
        assert len(lines) == 2
    assert "others/series" in cli("runs", "others").stdout
    helped = cli("runs", "--help")
    assert helped.returncode == 0
    assert all(command in helped.stdout for command in ("list", "watch", "stop", "logs"))


def test_a_folder_that_is_not_there_is_refused(cli: Cli, tmp_path: Path) -> None:
    refused(cli("runs", "nowhere"), "nowhere", "no such folder")
    refused(cli("runs", "wach"), "wach", "command 'watch'")
    (tmp_path / "empty").mkdir()
    refused(cli("runs", "empty"), "contains no runs", "mmtrain submit")
    make_run(tmp_path / "runs" / "digits")
    refused(cli("runs", "watch", "--every", "0"), "--every")


def test_a_narrow_terminal_has_fewer_columns(tmp_path: Path) -> None:
    from rich.console import Console

    noted(make_run(tmp_path / "run"), "submitted", job="7", nodes="2", tasks=8)
    found = run_statuses([tmp_path / "run"])
    assert len(table(found, 300).columns) == len(COLUMNS)
    narrow = table(found, 80 + len(str(tmp_path)))
    assert {"nodes", "restarts"}.isdisjoint(str(column.header) for column in narrow.columns)
    console = Console(width=80 + len(str(tmp_path)))
    with console.capture() as capture:
        console.print(narrow)
    assert len(capture.get().splitlines()) == 2


def test_a_name_with_brackets_is_shown_as_it_is(cli: Cli, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "[red]x[/red]")
    assert "[red]x[/red]" in cli("runs").stdout


def test_spans_are_in_one_unit() -> None:
    assert [span(s) for s in (5, 119, 600, 7200, 200_000)] == ["5 s", "119 s", "10 min", "2 h", "2 d"]


def test_the_table_comes_quickly(tmp_path: Path) -> None:
    for i in range(20):
        make_run(tmp_path / "runs" / str(i), 50)
    assert cpu_seconds("-m", "mmtrain", "runs", tmp_path / "runs") < 3


# ---------------------------------------------------------------- stop


def test_a_run_here_is_stopped_by_a_signal(cli: Cli, tmp_path: Path, process: subprocess.Popen[bytes]) -> None:
    run = make_run(tmp_path / "run")
    noted(run, "started", BEGIN, job=None, restart=0, hosts=[HERE], world=1, pid=process.pid, host=HERE)
    done = cli("runs", "stop", run)
    assert done.returncode == 0, done.stderr
    assert f"process {process.pid}" in done.stdout
    assert "the command that started the run" in done.stdout
    assert process.wait(10) == -signal.SIGTERM
    assert not (run / "stop.request").exists()  # nothing would queue it again
    refused(cli("runs", "stop", run), "has ended")


def test_what_does_not_run_cannot_be_stopped(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmtrain.runs.slurm.has_slurm", lambda: False)
    refused(cli("runs", "stop", tmp_path), "not a run folder")
    run = make_run(tmp_path / "run")
    refused(cli("runs", "stop", run), "jobs.jsonl", "Ctrl-C")
    noted(run, "started", BEGIN, job=None, restart=0, hosts=["far"], world=1, pid=1, host="far")
    refused(cli("runs", "stop", run), "runs on another machine, far")
    noted(run, "submitted", BEGIN, job="7", nodes="1", tasks=1)
    refused(cli("runs", "stop", run), "job 7", "login node")
    (run / "result.json").write_text(json.dumps({"test": None}))
    refused(cli("runs", "stop", run), "finished")
    assert not (run / "stop.request").exists()


def test_a_slurm_job_is_signalled_or_cancelled(cli: Cli, slurm: Path) -> None:
    run = make_run(slurm / "run")
    noted(run, "submitted", BEGIN, job="7", nodes="1", tasks=1)
    refused(cli("runs", "stop", run), "job 7 has ended")
    assert not (run / "stop.request").exists()
    (slurm / "queue").write_text("6|PENDING\n7|RUNNING\n")
    done = cli("runs", "stop", run)
    assert "SIGUSR2" in done.stdout
    assert (run / "stop.request").exists()
    (slurm / "queue").write_text("7|PENDING\n")
    (run / "stop.request").unlink()
    assert "has been cancelled" in cli("runs", "stop", run).stdout
    assert not (run / "stop.request").exists()
    assert (slurm / "cancelled").read_text().splitlines() == ["--signal=USR2 7", "7"]


def test_a_refusal_of_slurms_is_told_and_leaves_no_request(cli: Cli, slurm: Path) -> None:
    run = make_run(slurm / "run")
    noted(run, "submitted", BEGIN, job="7", nodes="1", tasks=1)
    (slurm / "queue").write_text("7|RUNNING\n")
    (slurm / "bin" / "scancel").write_text("#!/bin/sh\necho 'Access denied' >&2\nexit 1\n")
    refused(cli("runs", "stop", run), "Access denied")
    assert not (run / "stop.request").exists()
    (slurm / "bin" / "squeue").write_text("#!/bin/sh\nexit 1\n")
    refused(cli("runs", "stop", run), "does not answer")


# ---------------------------------------------------------------- logs


def slurm_logs(run: Path) -> Path:
    folder = run / "slurm"
    folder.mkdir()
    for job, age in (("6", 100), ("7", 0)):
        for rank in (0, 1):
            for kind in ("out", "err"):
                file = folder / f"{job}_{rank}_log.{kind}"
                file.write_text("".join(f"{job} {rank} {kind} line {i}\n" for i in range(300)))
                os.utime(file, (BEGIN - age, BEGIN - age))
    noted(run, "started", BEGIN, job="7", hosts=[HERE], world=2, restart=0)
    return folder


def test_logs_of_the_newest_slurm_job(cli: Cli, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    noted(run, "submitted", BEGIN, job="7", nodes="1", tasks=2)
    refused(cli("runs", "logs", run), "no logs yet")
    folder = slurm_logs(run)
    (run / "log.txt").write_text("rank 0 writes this too\n")
    lines = cli("runs", "logs", run).stdout.splitlines()
    assert lines[0] == f"== {folder / '7_0_log.out'} =="
    assert lines[201] == f"== {folder / '7_0_log.err'} =="
    assert (lines[1], lines[200], lines[-1]) == ("7 0 out line 100", "7 0 out line 299", "7 0 err line 299")
    assert "7 1 err line 299" in cli("runs", "logs", run, "--rank", "1").stdout
    refused(cli("runs", "logs", run, "--rank", "5"), "rank 5", "ranks 0 to 1")


def test_logs_of_a_run_here(cli: Cli, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    refused(cli("runs", "logs", run), "no logs yet")
    (run / "log.txt").write_text("first\nlast, \N{GREEK SMALL LETTER ALPHA}\n")
    assert cli("runs", "logs", run).stdout == f"== {run / 'log.txt'} ==\nfirst\nlast, α\n"
    refused(cli("runs", "logs", run, "--rank", "1"), "rank 0", "--rank")


def test_what_is_printed_of_a_log_need_not_be_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"first\nsecond \xff\n")
    assert logs.print_from(log, 6) == 15
    assert capsys.readouterr().out == "second \N{REPLACEMENT CHARACTER}\n"


def test_follow_goes_on_with_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    log = run / "log.txt"
    log.write_text("one\n")
    rounds = iter(["two\n", "", "thr", "ee\n"])

    def sleep(seconds: float) -> None:
        text = next(rounds, None)
        if text is None:
            raise KeyboardInterrupt
        with log.open("a") as file:
            file.write(text)

    monkeypatch.setattr(logs.time, "sleep", sleep)
    logs.show_logs(str(run), 0, follow=True)
    assert capsys.readouterr().out == f"== {log} ==\none\ntwo\nthree\n"


@pytest.mark.slow
def test_watch_ends_with_ctrl_c(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "digits")
    command = [sys.executable, "-m", "mmtrain", "runs", "watch", str(tmp_path / "runs"), "--every", "0.2"]

    def take_interrupts() -> None:  # a shell's background jobs ignore them, and so would what they start
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=take_interrupts
    ) as watch:
        threading.Timer(4, watch.send_signal, [signal.SIGINT]).start()
        try:
            out, err = watch.communicate(timeout=30)
        finally:
            watch.kill()
    assert (watch.returncode, err) == (0, "")
    assert "vim2_nano" in out
