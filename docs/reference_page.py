"""The parts that docs/make_config_reference.py and docs/make_cli_reference.py share."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    columns = list(header)
    yield _row(columns)
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield _row(row)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |"


def markdown(docstring: str) -> str:
    """Return a docstring with its double backticks replaced by Markdown's single ones."""
    return re.sub(r"``([^`]*)``", r"`\1`", docstring)


def main(file: Path, page: Callable[[], str]) -> None:
    """Write ``page()`` to ``file``; with ``--check`` only exit with status 1 if the file differs from it."""
    parser = argparse.ArgumentParser(description=f"Write {file.name}.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    check = parser.parse_args().check
    text = page()
    if not check:
        file.write_text(text, encoding="utf-8")
    elif not file.is_file() or file.read_text(encoding="utf-8") != text:
        sys.exit(f"{file} is out of date. Run python {sys.argv[0]}")
