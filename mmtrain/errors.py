"""Exceptions whose message is shown to the user without a traceback, and helpers to raise them."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Invalid input. The message names the file, key or flag that is wrong and explains how to fix it.

    The command line prints only the message and exits with status 2 (``mmtrain.cli``).
    """


class SharedError(UserError):
    """A :class:`UserError` that all ranks raise with the same message. Only rank 0 prints it."""


class LostConnection(RuntimeError):
    """Another rank has died or does not respond. The command line prints only the message and exits with status 1."""


def nearest(word: str, candidates: Iterable[str], *, label: str = "did you mean") -> str:
    """Return ``"; did you mean 'x'?"`` for the candidate closest to ``word``, or "" if none is similar.

    Args:
        label: replaces "did you mean".
    """
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; {label} '{found[0]}'?" if found else ""


def environment_number(name: str, default: int, least: int = 0) -> int:
    """Return the integer in the environment variable ``name``, or ``default`` if it is empty or not set.

    Raises:
        UserError: if the value is not an integer of at least ``least``.
    """
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdecimal() and least <= int(text)):
        raise UserError(
            f"environment variable {name}={text!r}: must be an integer of at least {least}. torchrun and srun set it;"
            f" for a training in one process remove it (unset {name})"
        )
    return int(text) if text else default


@contextmanager
def os_errors(what: str, cure: str = "", *, kind: type[UserError] = UserError) -> Iterator[None]:
    """Convert an OSError in the block to a UserError: ``what`` failed, the reason in parentheses, and ``cure``.

    Args:
        kind: the class of the error.
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{what} ({error.strerror or error})" + (f"; {cure}" if cure else "")) from error
