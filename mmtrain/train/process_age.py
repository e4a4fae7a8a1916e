"""How long ago the operating system started this process: what a restart costs, imports and all."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STARTED = 19  # of what follows the name in brackets in /proc/self/stat: the start, in clock ticks since the boot


def process_age() -> float | None:
    """Seconds since this process was started, to 10 ms; None where the system does not tell (it has no /proc)."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[_STARTED]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError):
        return None
