"""The logger of mmtrain. It writes to standard error and to a log file in the run folder."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from mmtrain.errors import environment_number

#: The logger that every module uses.
logger = logging.getLogger("mmtrain")


def log_to_console() -> None:
    """Log to standard error: INFO and above on rank 0 (environment variable RANK), warnings on the other ranks.

    Handlers of earlier calls and of :func:`log_to_file` are removed.

    Raises:
        UserError: if RANK is not a number.
    """
    handler = logging.StreamHandler(sys.stderr)
    rank = environment_number("RANK", 0)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    handler.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


class _RunLog(logging.FileHandler):
    """A log file that ignores write errors. A full disk is reported by the code that needs the disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


def log_to_file(path: Path) -> None:
    """Also append all messages, with time and level, to the file ``path``. A previous log file is closed.

    Args:
        path: its folder must exist.
    """
    handler = _RunLog(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for old in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
        logger.removeHandler(old)
        old.close()
    logger.addHandler(handler)
