"""docs/data.md: its commands, keys, files and links are there, and its example prints what it shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from mmtrain.cli.app import app
from mmtrain.config import load_config
from mmtrain.config.data import DATA
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
_FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
_TEXT = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)


def commands(first: str) -> list[list[str]]:
    """The words of every command that begins with ``first``, in blocks and in `code`."""
    lines = [line for kind, block in _FENCES if not kind for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", _TEXT + README)
    return [shlex.split(line, comments=True) for line in lines if line.startswith(first) and "…" not in line]


def options(words: list[str]) -> Iterator[tuple[Any, str]]:
    """Each flag of a command line with the command it is given to; fails where there is no such command."""
    here: Any = get_command(app)
    for word in words:
        if word.startswith("--"):
            yield here, word.partition("=")[0]
        elif hasattr(here, "commands"):
            assert word in here.commands, f"there is no command {word!r} in {' '.join(words)}"
            here = here.commands[word]


@pytest.mark.parametrize("words", commands("mmtrain "), ids=" ".join)
def test_commands_and_their_flags_exist(words: list[str]) -> None:
    for command, flag in options(words[1:]):
        known = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
        assert flag in (*known, "--help"), f"{flag} in {' '.join(words)}"


@pytest.mark.parametrize("words", commands("python launch/submit.py --config"), ids=" ".join)
def test_the_configurations_of_the_runs_resolve(words: list[str]) -> None:
    overrides = [word for word in words if re.match(r"[a-z_]+(\.[a-z_0-9]+)?=", word)]
    load_config(words[words.index("--config") + 1], overrides)


def test_keys_exist() -> None:
    known = {name: {key for kind in kinds for key in kind.model_fields} for name, kinds in _sections().items()}
    named = set(re.findall(r"`(data|model|train|task)\.(\w+)", PAGE))
    assert len(named) > 30
    assert not [f"{section}.{key}" for section, key in named if key not in known[section]]
    undescribed = known["data"] - {key for section, key in named if section == "data"}
    assert not undescribed, "keys of data that docs/data.md does not mention"


def _sections() -> dict[str, list[type]]:
    configs = [load_config(name, []) for name in ("vim2_digits", "tsm2_etth1")]
    found = {name: [type(getattr(config, name)) for config in configs] for name in ("model", "train", "task")}
    return {**found, "data": list(DATA.values())}


def test_files_and_links_exist() -> None:
    files = set(re.findall(r"`((?:mmtrain|tests|configs|benchmarks|docs)/[\w/.]+\.\w+)`", PAGE))
    assert len(files) > 3
    assert not [file for file in files if not (ROOT / file).is_file()]
    headings = re.findall(r"^#+ (.*)$", _TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = re.findall(r"\]\(#([\w-]+)\)", PAGE)
    linked += re.findall(r"data\.md#([\w-]+)\)", (ROOT / "docs" / "install.md").read_text(encoding="utf-8"))
    assert len(linked) > 15
    assert not set(linked) - anchors


def test_the_example_of_a_source_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    place = next(n for n, (_, block) in enumerate(_FENCES) if "class Squares" in block)
    exec(compile(_FENCES[place][1], "docs/data.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == _FENCES[place + 1][1]
