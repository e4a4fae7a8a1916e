"""Random damage to everything that mmtrain reads: ``python -m tests.hostile.fuzz --minutes 10``.

Each target reads one kind of input. It may succeed or refuse with a :class:`UserError` (exit status 2 for commands).
Anything else is a finding: another exception, more than 20 seconds, more than 4 GiB of memory, or a file named
``executed``. Hypothesis makes the inputs and shrinks those that fail.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings

from mmtrain.errors import UserError
from tests.hostile.targets import Target, make_targets

_SECONDS, _MEMORY, _BATCH = 20, 4 * 2**30, 100


class TooSlow(Exception):
    """A case took longer than it may."""


class Executed(Exception):
    """An input made the reader run a command."""


# ------------------------------------------------------------------ the search


@dataclass
class Finding:
    """One fault: where it came up, and the smallest input that shows it."""

    target: str
    error: str
    place: str
    case: str


def search(
    name: str, target: Target, seconds: float, start: int, examples: int | None = None
) -> tuple[int, list[Finding]]:
    """Try inputs for ``seconds``, or ``examples`` of them; the number tried, and one finding for each place."""
    found: dict[tuple[str, str], Finding] = {}
    tried = 0

    def attempt(case: Any) -> None:
        nonlocal tried
        tried += 1
        try:
            with _limits():
                target.read(case)
        except UserError:
            return
        except Exception as error:
            key = type(error).__name__, _place(error)
            if key in found and found[key].case:
                return
            last[key] = repr(case)
            raise

    end, number = time.monotonic() + seconds, start
    while (tried < examples) if examples is not None else (time.monotonic() < end):
        last: dict[tuple[str, str], str] = {}
        phases = (Phase.generate, Phase.shrink)
        most = _BATCH if examples is None else min(_BATCH, examples - tried)
        rules = settings(
            max_examples=most,
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )
        try:
            rules(seed(number)(given(target.inputs)(attempt)))()
        except Exception as error:
            key = type(error).__name__, _place(error)
            words = str(error).splitlines()[:1]
            found[key] = Finding(name, f"{key[0]}: {''.join(words)}", key[1], last.get(key, ""))
        number += 1
    return tried, list(found.values())


def _place(error: BaseException) -> str:
    """The last line of ours in the traceback, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}mmtrain{os.sep}" in frame.filename] or frames
    return " <- ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in (frames[-1], ours[-1]))


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise TooSlow(f"longer than {_SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(_SECONDS)
    quiet = contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO()))
    try:
        with quiet, contextlib.redirect_stderr(io.TextIOWrapper(io.BytesIO())), warnings.catch_warnings():
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if Path("executed").exists():
        Path("executed").unlink()
        raise Executed("a command was run")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="time in all, shared by the targets")
    parser.add_argument("--examples", type=int, help="inputs of each target, in place of --minutes")
    parser.add_argument("--target", action="append", help="only this target; may be given several times")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    options = parser.parse_args()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    space = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 if Path("/proc/self/statm").exists() else used
    resource.setrlimit(resource.RLIMIT_AS, (space + _MEMORY, resource.RLIM_INFINITY))
    folder = Path(tempfile.mkdtemp(prefix="mmtrain-fuzz-"))
    shutil.copytree(Path(__file__).resolve().parents[2] / "configs", folder / "configs")
    os.chdir(folder)
    try:
        targets = make_targets(folder)
        if unknown := sorted(set(options.target or ()) - set(targets)):
            parser.error(f"no such target: {', '.join(unknown)} (targets: {', '.join(targets)})")
        chosen = options.target or list(targets)
        logging.getLogger("mmtrain").handlers.clear()
        logging.getLogger("mmtrain").propagate = False
        counts: Counter[str] = Counter()
        findings: list[Finding] = []
        for name in chosen:
            seconds = options.minutes * 60 / len(chosen)
            tried, found = search(name, targets[name], seconds, options.seed, options.examples)
            counts[name] = tried
            findings += found
            print(f"{name}: {tried} inputs, {len(found)} findings", flush=True)
            for finding in found:
                print(f"  {finding.error}\n    at {finding.place}\n    input: {finding.case[:2000]}", flush=True)
        print(json.dumps({"seed": options.seed, "inputs": counts, "findings": len(findings)}))
        return 1 if findings else 0
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    np.seterr(all="ignore")
    sys.exit(main())
