"""The project's logger: plain lines on standard error, and in the run folder."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from mmtrain.errors import environment_number

#: The logger of every module.
logger = logging.getLogger("mmtrain")


def log_to_console() -> None:
    """Write lines of INFO and above to standard error; on ranks other than 0 (environment RANK), warnings only.

    The handlers of an earlier call, and of :func:`log_to_file`, are removed.

    Raises:
        UserError: for a RANK that is no number.
    """
    handler = logging.StreamHandler(sys.stderr)
    rank = environment_number("RANK", 0)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


class _RunLog(logging.FileHandler):
    """A log file that says nothing when it cannot be written: whatever needs the disk reports a full one itself."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


def log_to_file(path: Path) -> None:
    """Append every line, with time and level, to ``path``; an earlier log file is closed.

    Args:
        path: a file in a folder that exists.
    """
    handler = _RunLog(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for old in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
