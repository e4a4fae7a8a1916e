"""docs/config.md is the schema, and says something about every key."""

from __future__ import annotations

import re
from importlib import import_module

import pytest

from mmtrain.config import DATA, MODELS, TASKS, RunConfig
from mmtrain.config.section import Section
from tests.conftest import ROOT


def test_the_page_is_what_the_schema_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    page = import_module("make_config_reference").page()
    assert page == (ROOT / "docs" / "config.md").read_text(encoding="utf-8"), "run python docs/make_config_reference.py"
    listed = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))
    sections = [type(value) for _, value in RunConfig() if isinstance(value, Section)]
    sections += [registry[kind] for registry in (MODELS, DATA, TASKS) for kind in registry]
    keys = {f"{section.prefix}{key}" for section in sections for key in section.model_fields}
    assert keys <= listed


def test_every_key_is_described() -> None:
    undescribed = [
        f"{section.prefix}{key}"
        for section in (type(value) for _, value in RunConfig() if isinstance(value, Section))
        for key, field in section.model_fields.items()
        if not field.description
    ]
    for registry in (MODELS, DATA, TASKS):
        for kind in registry:
            fields = registry[kind].model_fields.items()
            undescribed += [f"{kind}: {key}" for key, field in fields if not field.description and key != registry.key]
    assert not undescribed
