"""Whether a process of this machine is one of ours."""

from __future__ import annotations

from pathlib import Path


def runs_training(pid: int) -> bool:
    """True where the process ``pid`` is there and its command line names mmtrain or its launcher.

    The number alone would not do: after a restart of the machine another process may have it.
    """
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"mmtrain" in command or b"submit.py" in command
