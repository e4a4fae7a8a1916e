"""docs/cli.md is current, and every command has a text, examples and described options."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return import_module("make_cli_reference")


def test_the_page_is_what_the_help_texts_give(reference: ModuleType) -> None:
    page = reference.page()
    assert page == (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), "run python docs/make_cli_reference.py"
    for command in ("train", "submit", "runs watch", "data get", "data prepare panel", "doctor"):
        section = page.partition(f"# mmtrain {command}\n")[2].partition("\n#")[0]
        assert f"```\nmmtrain {command}" in section
    assert re.search(r"^\| `--restarts` \| integer \| `0` \| \S", page, re.MULTILINE)
    undescribed = re.findall(r"^\| `.*\| *\|$", page, re.MULTILINE)
    assert not undescribed


def test_every_command_of_an_example_exists(reference: ModuleType) -> None:
    known = {path for path, _ in reference._commands("mmtrain", reference.get_command(reference.app))}
    known |= {"mmtrain runs"}
    for block in re.findall(r"^```\n(.*?)^```", reference.page(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("mmtrain "):
                assert any(f"{line} ".startswith(f"{path} ") for path in known), line


def test_check_fails_for_another_page(reference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["make", "--check"])
    with pytest.raises(SystemExit, match="out of date"):
        reference.main(page, lambda: "text")
    assert not page.exists()
    page.write_text("text")
    reference.main(page, lambda: "text")
    monkeypatch.setattr(sys, "argv", ["make"])
    reference.main(page, lambda: "new")
    assert page.read_text() == "new"
