"""The documents of data: every key is mentioned, and the example prints what it shows.

docs/check.py checks their commands, configurations, paths and links.
"""

from __future__ import annotations

import re

import pytest

from mmtrain.config.data import DATA
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def test_every_key_is_mentioned() -> None:
    named = set(re.findall(r"`data\.(\w+)", PAGE))
    known = {key for kind in DATA.values() for key in kind.model_fields}
    assert not known - named, "keys of data that docs/data.md does not mention"


def test_the_example_of_a_source_prints_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    (_, code), (_, printed) = _FENCE.findall((ROOT / "docs" / "data_source.md").read_text(encoding="utf-8"))
    exec(compile(code, "docs/data_source.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == printed
