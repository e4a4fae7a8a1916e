"""Runs on a real cluster of four nodes: they start, and come back from what ends their jobs, but only from that."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.slurm.cluster import ROOT, Cluster, Run
from tests.train.compare import last_checkpoint, same_end, tensors_of

pytestmark = pytest.mark.slow

#: Samples and steps of an epoch of the tiny configuration.
SAMPLES, STEPS = 480, 10

#: Steps of the runs that are disturbed: more than their disturbances leave time for in between.
LONG = "train.max_steps=600"


def assert_every_sample_once(run: Run, steps: int) -> None:
    consumed = run.consumed()
    assert list(consumed) == list(range(steps))
    for first in range(0, steps - STEPS + 1, STEPS):
        epoch = [sample for step in range(first, first + STEPS) for sample in consumed[step]]
        assert sorted(epoch) == list(range(SAMPLES))


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 600 steps on 4 nodes that nothing happens to."""
    run = cluster.submit(tmp_path_factory.mktemp("undisturbed") / "run", "--nodes", "4", LONG)
    run.wait_for_end()
    return run


@pytest.mark.timed
def test_the_first_step_comes_soon(cluster: Cluster, tmp_path: Path) -> None:
    """On 4 nodes 15 s after sbatch, which is dominated by the imports of four processes on two cores."""
    began = time.monotonic()
    run = cluster.submit(tmp_path / "run", "--nodes", "4")
    launcher = time.monotonic() - began
    run.wait_for_end()
    took = run.metrics("train")[0]["time"] - run.journal("submitted")[0]["time"]
    print(f"launcher {launcher:.2f} s, from the submission to the first step {took:.1f} s")
    assert launcher < 2
    assert took < 15


def test_eight_tasks_on_four_nodes_train_what_one_process_trains(cluster: Cluster, tmp_path: Path) -> None:
    run = cluster.submit(tmp_path / "slurm", "--nodes", "4", "--tasks-per-node", "2")
    alone = cluster.try_to_submit(
        "--config", str(cluster.configuration), "--run-dir", f"{tmp_path}/one", "--local", "1"
    )
    assert alone.returncode == 0, alone.stderr
    run.wait_for_end()
    started = run.journal("started")[-1]
    assert started["world"] == 8
    assert started["hosts"] == ["node1", "node2", "node3", "node4"]
    assert run.reasons() == ["finished"]
    together, one = run.losses(), Run(cluster, tmp_path / "one").losses()
    assert len(together) == 20
    for step, loss in one.items():
        assert math.isclose(together[step], loss, rel_tol=1e-4), step  # float32, another order of addition
    assert_every_sample_once(run, 20)


def test_a_run_comes_back_from_whatever_ends_its_job(cluster: Cluster, undisturbed: Run, tmp_path: Path) -> None:
    """Preemptions, a requeue, a lost node, a killed rank: the same weights, bit for bit, and each sample once."""
    run = cluster.submit(tmp_path / "run", "--nodes", "4", LONG, "tracking.wandb=offline")
    run.wait_for_start(1)
    cluster.preempt()
    run.wait_for_start(2)
    cluster.send_user_signal(False)
    cluster.preempt()
    run.wait_for_start(3)
    cluster.send_user_signal(True)
    cluster.ask("scontrol", "requeue", run.job)
    run.wait_for_start(4)
    cluster.ask("scontrol", "update", "nodename=node4", "state=down", "reason=test")
    run.wait(lambda: run.restarts() == 4, what="the requeue for a lost node")
    cluster.resume("node4")
    run.wait_for_start(5)
    os.kill(run.tasks()[-1], signal.SIGKILL)
    run.wait_for_start(6)
    run.wait_for_end()
    assert run.restarts() == 5
    assert len(run.journal("submitted")) == 1
    assert set(run.reasons()) == {"preempted", "lost", "finished"}
    assert run.reasons()[-1] == "finished"
    assert [line["step"] for line in run.metrics("train")] == list(range(1, 601))
    one, two = (tensors_of(last_checkpoint(path)) for path in (run.path, undisturbed.path))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert_every_sample_once(run, 600)
    parts = {path.name.rpartition("-")[2] for path in run.path.glob("wandb/offline-run-*")}
    assert parts == {(run.path / "wandb_id.txt").read_text().strip()}


def test_the_time_limit_is_no_end(cluster: Cluster, undisturbed: Run, tmp_path: Path) -> None:
    """Of 2 minutes the run leaves the last 85 s alone: it does not wait until it is killed."""
    run = cluster.submit(tmp_path / "run", "--nodes", "4", "--time", "2:00", "cluster.margin=85", LONG)
    run.wait_for_end(400)
    assert set(run.reasons()) == {"timeout", "finished"}
    assert run.restarts() == run.reasons().count("timeout") >= 1
    assert same_end(run.path, undisturbed.path)


def test_too_many_time_limits_are_an_end(cluster: Cluster, tmp_path: Path) -> None:
    words = ("--nodes", "1", "--time", "2:00", "cluster.margin=90", "cluster.max_timeouts=0", "train.max_steps=100000")
    run = cluster.submit(tmp_path / "run", *words)
    run.wait(lambda: run.reasons() == ["timeout"], 100, "the time limit")
    run.wait(lambda: run.state == "FAILED", 20, "the end of the job")
    assert not run.journal("ended")[0]["requeued"]
    assert "cluster.max_timeouts" in (tmp_path / f"run/slurm/{run.job}_0_log.out").read_text()


def test_preempted_in_the_middle_of_an_evaluation(cluster: Cluster, tmp_path: Path) -> None:
    """It is given up, and made by the next job: once, with the result it would have had."""
    words = ("--nodes", "2", "eval.every_steps=10", "data.val_length=8000", "train.max_steps=12")
    run = cluster.submit(tmp_path / "run", *words)
    run.wait(lambda: len(run.metrics("train")) == 10, what="step 10")
    time.sleep(1)
    assert not run.metrics("eval")
    asked = time.time()
    cluster.preempt()
    run.wait(lambda: run.reasons() == ["preempted"], 30, "the end of the job")
    assert run.journal("ended")[0]["time"] - asked < 10
    assert run.journal("ended")[0]["step"] == 10
    run.wait_for_end()
    assert run.reasons() == ["preempted", "finished"]
    assert [line["step"] for line in run.metrics("eval") if line["split"] == "val"] == [10, 12]
    assert all(line["samples"] == 8000 for line in run.metrics("eval") if line["split"] == "val")


def test_preempted_while_a_checkpoint_is_written(cluster: Cluster, tmp_path: Path) -> None:
    words = ("--nodes", "2", "train.max_steps=60")
    plain = cluster.submit(tmp_path / "plain", *words)
    plain.wait_for_end()
    run = cluster.submit(tmp_path / "run", *words, "checkpoint.every_steps=1")
    run.wait_for_start(1)
    run.wait(lambda: any(run.path.glob("checkpoints/*.partial")), what="a save")
    cluster.ask("scancel", "--signal=USR2", run.job)
    run.wait_for_end()
    assert run.reasons() == ["preempted", "finished"]
    assert same_end(run.path, plain.path)


def test_the_script_without_submitit_comes_back_too(cluster: Cluster, tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    environment = {**cluster.environment, "PATH": f"{binaries}:{cluster.environment['PATH']}"}
    flags = ["--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=30:00"]
    command = ["sbatch", "--parsable", *flags, "-o", str(tmp_path / "log.txt"), str(ROOT / "slurm/train.sbatch")]
    command += [str(tmp_path / "run"), "--config", str(cluster.configuration), "train.max_steps=100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = Run(cluster, tmp_path / "run")
    run.wait_for_start(1)
    cluster.preempt()
    run.wait_for_start(2)
    run.wait(lambda: run.reasons() == ["preempted", "finished"], what="the end")
    assert_every_sample_once(run, 100)


def test_a_signal_before_the_first_step(cluster: Cluster, tmp_path: Path) -> None:
    run = cluster.submit(tmp_path / "run", "--nodes", "2")
    run.wait(lambda: (run.path / f"slurm/{run.job}_0_log.out").exists(), what="the start of the tasks")
    run.wait(lambda: "Loading pickle" in (run.path / f"slurm/{run.job}_0_log.out").read_text(), what="the task")
    time.sleep(1)
    assert not run.metrics("train")
    cluster.ask("scancel", "--signal=USR2", run.job)
    run.wait_for_end()
    assert run.restarts() == 1
    assert run.reasons()[-1] == "finished"
    assert_every_sample_once(run, 20)


def test_too_short_a_grace_falls_back_on_the_last_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    words = ("--nodes", "2", "eval.every_steps=28", "data.val_length=1600000", "eval.batch_size=100000")
    cluster.ask("scontrol", "update", "partitionname=low", "GraceTime=1")
    try:
        run = cluster.submit(tmp_path / "run", *words, "train.max_steps=30")
        run.wait(lambda: len(run.metrics("train")) == 28, what="step 28")
        time.sleep(3)
        cluster.preempt()
        run.wait(lambda: run.restarts() == 1, what="the requeue")
    finally:
        cluster.ask("scontrol", "update", "partitionname=low", "GraceTime=10")
    run.wait_for_end()
    assert run.restarts() == 1
    assert run.metrics("resume")[0]["step"] == 25
    assert_every_sample_once(run, 30)


def test_a_run_moves_to_other_numbers_of_nodes(cluster: Cluster, undisturbed: Run, tmp_path: Path) -> None:
    run = cluster.submit(tmp_path / "run", "--nodes", "4", "train.max_steps=300")
    for nodes in (2, 3):
        run.wait_for_start(len(run.journal("submitted")))
        asked = time.time()
        cluster.ask(sys.executable, "-m", "mmtrain", "runs", "stop", str(run.path))
        run.wait(lambda: run.state == "COMPLETED", what="the job to leave")
        assert run.reasons()[-1] == "stopped"
        # from the signal to the durable checkpoint: 2 s and the time of writing, which is tenths of a second here; the
        # command that sends the signal takes half of one
        assert run.newest_save() - asked < 3
        cluster.submit(run.path, "--nodes", str(nodes))
    run.wait_for_end()
    assert [line["world"] for line in run.journal("started")] == [4, 2, 3]
    assert run.reasons() == ["stopped", "stopped", "finished"]
    assert_every_sample_once(run, 300)
    expected, losses = undisturbed.losses(), run.losses()
    # the schedule follows from the length of the run: the losses agree in the warm-up that both have
    assert list(losses) == list(range(1, 301))
    assert all(math.isfinite(loss) for loss in losses.values())
    assert math.isclose(losses[1], expected[1], rel_tol=1e-4)


_RAISES = """
import os
if os.environ.get("SLURM_PROCID") == "2":
    import importlib.abc, sys
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "mmtrain.train.loop":
                raise ArithmeticError("the third rank fails")
    sys.meta_path.insert(0, Finder())
"""


def test_a_rank_that_raises_ends_the_job_for_good(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_RAISES)
    run = cluster.submit(tmp_path / "run", "--nodes", "4", environment={"PYTHONPATH": str(tmp_path)})
    failures = tmp_path / "run/failures" / f"{run.job}_0"
    run.wait(lambda: failures.exists(), what="the error")
    began = time.monotonic()
    run.wait(lambda: run.state == "FAILED", 20, "the end of the job")
    assert time.monotonic() - began < 20
    assert run.restarts() == 0
    assert run.reasons() == ["failed"]
    told = (tmp_path / "run/failure.txt").read_text()
    assert told.startswith("rank 2 on node3 failed: ArithmeticError: the third rank fails")
    assert "Traceback" in told


def test_a_cancelled_run_does_not_come_back(cluster: Cluster, tmp_path: Path) -> None:
    run = cluster.submit(tmp_path / "run", "--nodes", "2", "train.max_steps=100000")
    run.wait_for_start(1)
    cluster.ask("scancel", run.job)
    run.wait(lambda: run.state == "CANCELLED", what="the end of the job")
    time.sleep(2)
    assert run.restarts() == 0
    assert max((tmp_path / "run/checkpoints").glob("step_*")).is_dir()


def test_a_running_run_outlives_its_launcher_and_is_not_submitted_twice(cluster: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch/submit.py"), "--config", str(cluster.configuration), "--follow"]
    command += ["--run-dir", str(tmp_path / "run"), "--nodes", "1", "train.max_steps=100000"]
    launcher = subprocess.Popen(command, env=cluster.environment, stdout=subprocess.DEVNULL)
    run = Run(cluster, tmp_path / "run")
    run.wait_for_start(1)
    launcher.kill()
    launcher.wait()
    table = cluster.ask(sys.executable, "-m", "mmtrain", "runs", str(tmp_path))
    assert "running" in table
    assert run.state == "RUNNING"
    again = cluster.try_to_submit("--resume", str(run.path))
    assert again.returncode == 2
    assert f"job {run.job} of this run is still in the queue" in again.stderr
    changed = cluster.try_to_submit("--resume", str(run.path), "model.dims=[8,32]")
    assert changed.returncode == 2
    assert "model.dims" in changed.stderr
    cluster.ask("scancel", run.job)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--partition", "nowhere"), "--partition must be one of: low, high"),
        (("--nodes", "9"), "--nodes 9: the cluster has only 4"),
        (("--gpus-per-node", "9"), "no node has enough CPUs"),
        (("--time", "1:00"), "leaves no time to train"),
        (("--time", "soon"), "write it in Slurm's format"),
        (("--run-dir", "/dev/shm/a_run"), "on shared storage"),
        (("--run-dir", "/proc/a_run"), "cannot be written"),
    ],
)
def test_what_could_not_run_is_refused(cluster: Cluster, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    where = () if "--run-dir" in words else ("--run-dir", str(tmp_path / "run"))
    nodes = () if "--nodes" in words else ("--nodes", "2")
    refused = cluster.try_to_submit("--config", str(cluster.configuration), *where, *nodes, *words)
    assert refused.returncode == 2, refused.stderr
    assert said in refused.stderr
    assert "Traceback" not in refused.stderr


def test_there_is_nothing_to_resume(cluster: Cluster, tmp_path: Path) -> None:
    refused = cluster.try_to_submit("--resume", str(tmp_path))
    assert refused.returncode == 2
    assert "contains no run" in refused.stderr
