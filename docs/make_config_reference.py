"""Write docs/config.md from the schema of the configuration: ``python docs/make_config_reference.py [--check]``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reference_page import main, markdown, table

from mmtrain.config import DATA, MODELS, TASKS, ForecasterConfig, ImageDataConfig, ImageModelConfig, RunConfig
from mmtrain.config.data import StoredImagesConfig
from mmtrain.config.registry import Registry
from mmtrain.config.section import Section, allowed, key_schemas

PAGE = Path(__file__).with_name("config.md")
_HEAD = """# Configuration keys

*Which keys does a configuration have, and what do they mean?*

This page is generated from the schema by `python docs/make_config_reference.py`. Do not edit it.

A key is written `section.key=value` on the command line and `section: {key: value}` in a YAML file. An empty cell under
"allowed" means any value of the type; numbers must be finite. The sections `model`, `data` and `task` have kinds. Each
kind has its own keys in addition to those of the tables that its section names.
"""
_TYPES = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "null": "null"}
_REGISTRIES: dict[str, Registry[Any]] = {"model": MODELS, "data": DATA, "task": TASKS}
#: Classes whose keys are shared by several kinds, but that are not kinds themselves.
_SHARED: dict[str, dict[type[Section], str]] = {
    "model": {ImageModelConfig: "models of images", ForecasterConfig: "forecasters"},
    "data": {ImageDataConfig: "images", StoredImagesConfig: "stored images"},
    "task": {},
}


def page() -> str:
    """Return the whole page."""
    parts = [_HEAD, *_section("Top level", RunConfig)]
    for name, default in RunConfig():
        if name in _REGISTRIES:
            parts += _kinds(name, _REGISTRIES[name])
        elif isinstance(default, Section):
            parts += _section(f"`{name}`", type(default))
    return "\n".join(parts)


def _kinds(name: str, registry: Registry[Any]) -> Iterator[str]:
    """Yield the keys of all kinds, then those that several kinds share, then those of each kind."""
    yield from _section(f"`{name}`", registry.base)
    titles = {registry.base: f"`{name}`", **_SHARED[name]}
    for cls, title in _SHARED[name].items():
        yield from _section(f"`{name}`, {title}", cls, titles)
    kinds: dict[type[Section], list[str]] = {}
    for kind in registry:
        kinds.setdefault(registry[kind], []).append(kind)
    for cls, names in kinds.items():
        titles[cls] = f"`{name}.{registry.key}={names[0]}`"
        shown = ", ".join(f"`{kind}`" for kind in names)
        yield from _section(f"`{name}.{registry.key}`: {shown}", cls, titles)


def _section(title: str, cls: type[Section], titles: dict[type[Section], str] | None = None) -> Iterator[str]:
    """Yield a heading, the docstring, and a table of the keys that ``cls`` adds to its base classes."""
    above = next((parent for parent in cls.__mro__[1:] if parent in (titles or {})), None)
    yield f"## {title}\n"
    yield markdown(inspect.getdoc(cls) or "") + "\n"
    if above is not None and titles is not None:
        yield f"In addition to the keys of {titles[above]}:\n"
    inherited = above.model_fields if above is not None else {}
    yield from table(("key", "type", "default", "allowed", "description"), _rows(cls, inherited))
    yield ""


def _rows(cls: type[Section], inherited: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, schema in key_schemas(cls).items():
        field = cls.model_fields[key]
        new = key not in inherited or repr(field) != repr(inherited[key])
        if new and field.description is not None:
            default = field.get_default(call_default_factory=True)
            shown = default if isinstance(default, str) and default else json.dumps(default)
            limits = allowed(schema, typed=False).removesuffix(", or null")
            yield f"`{cls.prefix}{key}`", _type(schema), f"`{shown}`", limits, field.description


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"])
    return f"list of {_type(schema['items'])}" if schema["type"] == "array" else _TYPES[schema["type"]]


if __name__ == "__main__":
    main(PAGE, page)
