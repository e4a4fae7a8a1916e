"""Profile a few steps (``train.profile``): a trace, a table of operations and memory, written to the run folder."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mmtrain.log import logger
from mmtrain.parallel.ranks import Ranks

#: With more ranks than this, only the first and the last are profiled: a trace takes tens of megabytes.
_ALL_RANKS = 8
#: Rows of the table of operations; length of CUDA's allocation history.
_ROWS, _HISTORY = 60, 200_000


class StepProfiler:
    """Profiles the steps ``span``. A context manager around the train loop. Without a span it costs nothing.

    After the last step of the span, or at the end of the run, it writes to ``<folder>/profile``:

    - ``trace_rank00000_steps10-12.json.gz``: a Chrome trace (chrome://tracing, ui.perfetto.dev) with named steps;
    - ``ops_rank00000_steps10-12.txt``: operations by self time, longest first;
    - on a GPU, ``memory_rank00000_steps10-12.pickle``: torch's memory snapshot (docs.pytorch.org/memory_viz);
    - on a CPU, ``memory_rank00000_steps10-12.csv``: bytes allocated since the start of the profile, over time.

    If a file cannot be written, the profiler logs a warning and the run continues.

    Args:
        span: first and last step to profile, counted from 1, or None (``config.train.profiled()``).
        folder: the run folder.
    """

    def __init__(self, span: tuple[int, int] | None, folder: Path, ranks: Ranks) -> None:
        chosen = ranks.world <= _ALL_RANKS or ranks.rank in (0, ranks.world - 1)
        self.span = span if chosen else None
        self.folder, self.ranks, self._on_gpu = folder / "profile", ranks, ranks.device.type == "cuda"
        self._profile: profile | None = None
        self._named: AbstractContextManager[Any] | None = None
        self._first = self._last = 0

    def step(self, number: int) -> None:
        """Start or stop the profile as needed. Call it before each step with the step's number, counted from 1."""
        if self.span is None:
            return
        first, last = self.span
        if first <= number <= last:
            if self._profile is None:
                self._first = number
                activities = [ProfilerActivity.CPU]
                if self._on_gpu:
                    activities.append(ProfilerActivity.CUDA)
                    torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
                self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
                self._profile.start()
            self._name_step(number)
        elif self._profile is not None:
            self._stop()
        elif number > last:
            logger.info(
                "train.profile: nothing to profile, the run resumes at step %d after steps %d to %d",
                number,
                first,
                last,
            )
            self.span = None

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is not None:
            self._stop()

    def _name_step(self, number: int | None) -> None:
        """End the named range of the previous step in the trace. Begin the next one unless ``number`` is None."""
        if self._named is not None:
            self._named.__exit__(None, None, None)
            self._named = None
        if number is not None:
            self._last = number
            self._named = record_function(f"step {number}")
            self._named.__enter__()

    def _stop(self) -> None:
        """End the profile and write its files. There is no second profile in this process."""
        assert self._profile is not None
        self._name_step(None)
        found, self._profile, self.span = self._profile, None, None
        try:
            if self._on_gpu:
                torch.cuda.synchronize(self.ranks.device)  # wait for the kernels of the last step
            found.stop()
            self._write(found)
        # Kineto raises RuntimeError if it cannot write. After a CUDA error, every call raises RuntimeError.
        except (OSError, RuntimeError) as error:
            logger.warning("train.profile: could not write to %s: %s", self.folder, error)
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, found: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank{self.ranks.rank:05d}_steps{self._first}-{self._last}"
        by = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=80)
        (self.folder / f"ops_{name}.txt").write_text(table)
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_{name}.pickle"))
            memory = "a memory snapshot"
        else:
            (self.folder / f"memory_{name}.csv").write_text(_timeline(found))
            memory = "a timeline of allocated bytes (memory snapshots exist for GPUs only)"
        found.export_chrome_trace(str(self.folder / f"trace_{name}.json.gz"))
        message = "train.profile: wrote a trace, %s and a table of operations of steps %d to %d to %s"
        logger.info(message, memory, self._first, self._last, self.folder)


def _timeline(found: profile) -> str:
    """Return a CSV with one row per allocation or release: seconds, change in bytes, bytes allocated since the start.

    The last column can become negative, if memory is released that was allocated before the profile.
    """
    results = getattr(found.profiler, "kineto_results", None)
    changes = [(e.start_ns(), e.nbytes()) for e in (results.events() if results else []) if e.name() == "[memory]"]
    changes.sort()
    lines, total = ["seconds,change,allocated"], 0
    for when, change in changes:
        total += change
        lines.append(f"{(when - changes[0][0]) / 1e9:.9f},{change},{total}")
    return "\n".join(lines) + "\n"
