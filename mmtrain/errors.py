"""Errors that are the user's to fix: one clear message, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message names the file, key or flag that is wrong, and the cure.

    The command line prints the message alone and exits with status 2 (``mmtrain.cli``).
    """


class SharedError(UserError):
    """A :class:`UserError` that every rank of a job raises alike: rank 0 says it for all."""


class LostConnection(RuntimeError):
    """Another rank is gone or late. The command line prints the message alone and exits with status 1."""


def nearest(word: str, candidates: Iterable[str], *, label: str = "did you mean") -> str:
    """Return ``"; did you mean 'x'?"`` for the closest candidate, or an empty string if none is close."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; {label} '{found[0]}'?" if found else ""


def environment_number(name: str, default: int, least: int = 0) -> int:
    """The whole number in the environment variable ``name``; ``default`` where it is not set, or empty.

    Raises:
        UserError: for what is no whole number, or one below ``least``.
    """
    text = os.environ.get(name, "").strip()
    if text and not (text.isascii() and text.isdecimal() and least <= int(text)):
        raise UserError(
            f"the environment variable {name} is {text!r}: it must be a whole number, at least {least}; torchrun and"
            f" srun set it, and a process that trains alone needs none (unset {name})"
        )
    return int(text) if text else default


@contextmanager
def os_errors(what: str, cure: str = "", *, kind: type[UserError] = UserError) -> Iterator[None]:
    """Raise a UserError in place of an OSError: ``what`` went wrong, the system's reason in brackets, and the cure."""
    try:
        yield
    except OSError as error:
        raise kind(f"{what} ({error.strerror or error})" + (f"; {cure}" if cure else "")) from error
