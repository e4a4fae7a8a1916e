"""docs/config.md is the schema, and says something about every key."""

from __future__ import annotations

import importlib.util
import re

from mmtrain.config import DATA, MODELS, TASKS, RunConfig
from mmtrain.config.section import Section
from tests.conftest import ROOT


def test_the_page_is_what_the_schema_gives() -> None:
    file = ROOT / "docs" / "make_config_reference.py"
    spec = importlib.util.spec_from_file_location("make_config_reference", file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = made.page()
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
