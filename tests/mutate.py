"""Mutation testing: change one place of the code at a time and see whether a test fails.

    python -m tests.mutate --sample 150 --seed 0

mutmut and cosmic-ray are not used: mutmut chooses tests by running the whole suite once, cosmic-ray starts a process
for every mutant (4 s of imports), and neither samples by a seed. This driver works in a copy of the tree, never in the
checkout. Each mutant runs the test files that import or mention what it changes, the most specific first, fast tests
before slow ones, in a forked process that has torch and pytest imported already but nothing of mmtrain.

Kernels are changed by the list `mutants/kernels.toml`. `mutants/equivalent.toml` lists mutants that change no
behaviour, each with the reason; they do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants.operators import Mutant, mutants_of
from tests.mutants.responsible import mutant_tests

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "tests" / "mutants"
SCOPE = ["train", "tasks", "models", "runs", "cluster", "data/core", "data/series"]
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
        for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
            del sys.modules[name]
        bad = [f"--deselect={name}" for name, sound in self.sound.items() if not sound]
        marks = ["-m", which] if which else []
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *marks, *bad]
        os._exit(int(pytest.main([*options, *tests], plugins=[Report(self.report)])))

    def caught_by(self, mutant: Mutant, limit: float) -> str | None:
        """The name of the test that fails with ``mutant`` and passes without it."""
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
        return None


def all_mutants(only: str | None) -> list[Mutant]:
    """Every mutant of the scope or of the file or folder ``only``."""
    folders = [Path(only)] if only else [Path("mmtrain") / name for name in SCOPE]
    found: list[Mutant] = []
    for folder in folders:
        files = [ROOT / folder] if folder.suffix == ".py" else sorted((ROOT / folder).rglob("*.py"))
        for path in files:
            found += mutants_of(str(path.relative_to(ROOT)), path.read_bytes())
    return found


def kernel_mutants() -> list[Mutant]:
    """The patches of the list; raises ValueError where the text to replace is not in the file exactly once."""
    found = []
    for patch in tomllib.loads((LISTS / "kernels.toml").read_text())["patch"]:
        source, old, new = (ROOT / patch["file"]).read_bytes(), patch["old"].encode(), patch["new"]
        if source.count(old) != 1:
            raise ValueError(f"kernels.toml: {patch['old']!r} is {source.count(old)} times in {patch['file']}")
        begin, key = source.index(old), f"{patch['file']}: {patch['old']} -> {new}"
        found.append(Mutant(key, patch["file"], "", begin, begin + len(old), new, patch["old"], tuple(patch["tests"])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation testing of mmtrain.")
    parser.add_argument("--sample", type=int, default=150, help="number of mutants of Python code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a file or folder, e.g. mmtrain/train")
    parser.add_argument("--kernels", action="store_true", help="the kernels' patches instead of a sample")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time; the same command continues")
    parser.add_argument("--limit", type=float, default=400, help="seconds for one mutant")
    parser.add_argument("--again", action="store_true", help="run the survivors of the results again")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its own copy of the tree")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    options = parser.parse_args()
    known = tomllib.loads((LISTS / "equivalent.toml").read_text()).get("mutant", [])
    equivalent = {entry["key"]: entry["reason"] for entry in known}
    if options.kernels:
        chosen = kernel_mutants()
    else:  # by a hash of its text: a change elsewhere leaves a mutant in the sample
        order = {m.key: hashlib.sha256(f"{options.seed} {m.key}".encode()).digest() for m in all_mutants(options.only)}
        chosen = sorted(all_mutants(options.only), key=lambda m: order[m.key])[: options.sample]
    if options.list:
        print("\n".join(mutant.key for mutant in chosen))
        return
    for name in PRELOAD:
        importlib.import_module(name)
    found = read_results(options.results)
    again = {key for key, entry in found.items() if options.again and entry["caught"] is None}
    todo = [m for m in chosen if m.key not in equivalent and (m.key not in found or m.key in again)]
    end = time.monotonic() + 60 * options.minutes
    jobs = []
    for job in range(options.jobs):
        if child := os.fork():
            jobs.append(child)
            continue
        with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
            work(Tree(Path(folder)), todo[job :: options.jobs], options.results, options.limit, end)
        os._exit(0)
    for child in jobs:
        os.waitpid(child, 0)
    tell(chosen, read_results(options.results), equivalent)


def work(tree: Tree, mutants: list[Mutant], results: Path, limit: float, end: float) -> None:
    """Run ``mutants`` until ``end`` and append a line of JSON for each to ``results``."""
    for mutant in mutants:
        if (began := time.monotonic()) > end:
            break
        caught = tree.caught_by(mutant, limit)
        line = {"key": mutant.key, "caught": caught, "seconds": round(time.monotonic() - began, 1)}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{'caught' if caught else 'SURVIVED'} {mutant.key}   [{caught}]", flush=True)


def read_results(file: Path) -> dict[str, dict[str, str | None]]:
    """The last result of each mutant, by its key."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def tell(chosen: list[Mutant], results: dict[str, dict[str, str | None]], equivalent: dict[str, str]) -> None:
    """Print the survivors with their change, and the score."""
    counted = [m for m in chosen if m.key not in equivalent and m.key in results]
    alive = [m for m in counted if results[m.key]["caught"] is None]
    for mutant in alive:
        print(f"\n{mutant.path} {mutant.function}\n- {mutant.old}\n+ {mutant.new}")
    same = sum(m.key in equivalent for m in chosen)
    caught = len(counted) - len(alive)
    print(
        f"\n{caught} of {len(counted)} caught ({100 * caught / max(len(counted), 1):.0f} %), {same} equivalent,",
        end=" ",
    )
    print(f"{len(chosen) - len(counted) - same} not run")


if __name__ == "__main__":
    main()
