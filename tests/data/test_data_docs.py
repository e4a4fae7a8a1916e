"""The documents of data: their configurations resolve, every key is mentioned, the example prints what it shows.

docs/check.py checks their commands, options, keys, paths and links.
"""

from __future__ import annotations

import re
import shlex

import pytest

from mmtrain.config import load_config
from mmtrain.config.data import DATA
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def runs() -> list[list[str]]:
    """The arguments of every training command."""
    blocks = [block.replace("\\\n", " ") for kind, block in _FENCE.findall(PAGE) if not kind]
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python launch/submit.py --config")]


@pytest.mark.parametrize("words", runs(), ids=" ".join)
def test_the_configurations_of_the_runs_resolve(words: list[str]) -> None:
    overrides = [word for word in words if re.match(r"[a-z_]+(\.[a-z_0-9]+)?=", word)]
    load_config(words[words.index("--config") + 1], overrides)


def test_every_key_is_mentioned() -> None:
    named = set(re.findall(r"`data\.(\w+)", PAGE))
    known = {key for kind in DATA.values() for key in kind.model_fields}
    assert not known - named, "keys of data that docs/data.md does not mention"


def test_the_example_of_a_source_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (_, code), (_, printed) = _FENCE.findall((ROOT / "docs" / "data_source.md").read_text(encoding="utf-8"))
    exec(compile(code, "docs/data_source.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == printed
