"""The work copy of the tree, in which mutants are made and tests run in forked processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants.operators import Mutant
from tests.mutants.responsible import mutant_tests

ROOT = Path(__file__).resolve().parents[2]
PRELOAD = ["torch", "pandas", "pyarrow.parquet", "pydantic", "omegaconf", "typer", "rich"]
PRELOAD += ["matplotlib.pyplot", "hypothesis", "submitit", "torch.distributed.fsdp", "torch.distributed.checkpoint"]
#: Seconds of CPU time, and of waiting, that one test may take before it counts as failed.
TEST_CPU, TEST_WALL = 60, 300


class Report:
    """Plugin in the forked process: ends it at the first failure and leaves the test's name in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def end(self, test: str) -> None:
        self.file.write_text(test)
        os._exit(1)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        for alarm in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(alarm, lambda *_: self.end(item.nodeid))
        signal.setitimer(signal.ITIMER_PROF, TEST_CPU)
        signal.setitimer(signal.ITIMER_REAL, TEST_WALL)
        result = yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.end(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.end(report.nodeid)


class Tree:
    """The work copy, and the tests that fail in it without any mutant."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tree"
        listed = ["git", "ls-files", "-co", "--exclude-standard"]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
        for name in [*filter(None, files), "mmtrain/ops/cpu/_kernels.so"]:
            if (ROOT / name).is_file():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.path / name)
        # compiled by content: two versions of one size within a second are not taken for each other
        command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "mmtrain"]
        subprocess.run(command, cwd=self.path, check=True)
        self.report = folder / "failed"
        self.sound: dict[str, bool] = {}
        os.environ |= {"PYTHONPATH": str(self.path), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        os.environ["MMTRAIN_CACHE"] = str(folder / "cache")

    def failing(self, tests: list[str], which: str | None, limit: float) -> str | None:
        """The first test that fails, None if none does or the time is over."""
        self.report.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._run(tests, which)
        end, status = time.monotonic() + limit, 0
        while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if done[0]:
            status = os.waitstatus_to_exitcode(done[1])
        else:
            os.waitpid(child, 0)
        if self.report.is_file():
            return self.report.read_text()
        return f"{tests[0]} (the process died: {status})" if status < 0 or status in (2, 3) else None

    def _run(self, tests: list[str], which: str | None) -> None:
        os.setsid()
        os.chdir(self.path)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.path[:] = [str(self.path), *(p for p in sys.path if p not in ("", str(ROOT), str(self.path)))]
        sys.dont_write_bytecode = True
        own = [name for name in sys.modules if name.split(".")[0] == "tests"]
        for name in own:
            del sys.modules[name]
        bad = [f"--deselect={name}" for name, sound in self.sound.items() if not sound]
        marks = ["-m", which] if which else []
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *marks, *bad]
        os._exit(int(pytest.main([*options, *tests], plugins=[Report(self.report)])))

    def caught_by(self, mutant: Mutant, limit: float) -> str | None:
        """The name of the test that fails with ``mutant`` and passes without it, or None.

        Raises:
            TimeoutError: if no test failed, but not all have run within ``limit`` seconds.
        """
        target = self.path / mutant.path
        whole = target.read_bytes()
        end = time.monotonic() + limit
        for tests, which in mutant_tests(mutant):
            while (left := end - time.monotonic()) > 0:
                target.write_bytes(mutant.apply(whole))
                failed = self.failing(tests, which, left)
                target.write_bytes(whole)
                if failed is None:
                    break
                name = failed.split(" (")[0]
                if name not in self.sound:
                    self.sound[name] = self.failing([name], None, 2 * TEST_WALL) is None
                target.write_bytes(mutant.apply(whole))  # a failure that does not recur is of a busy machine
                again = self.sound[name] and self.failing([name], None, 2 * TEST_WALL) is not None
                target.write_bytes(whole)
                if again:
                    return failed
                self.sound[name] = False
        if time.monotonic() > end:
            raise TimeoutError
        return None
