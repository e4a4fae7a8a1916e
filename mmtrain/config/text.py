"""Read YAML files and ``key=value`` overrides as text, and convert text to the type of each key.

YAML guesses types: it reads ``007`` as 7, ``NO`` as false and ``24:00:00`` as 86400. Here every scalar except null
remains text until :func:`typed` converts it to the type that its key declares.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mmtrain.config.section import Section, key_schemas
from mmtrain.errors import UserError, os_errors

#: Limits of a YAML file: bytes, values after expansion of aliases, and levels. A configuration has three levels.
_MOST_BYTES, _MOST_VALUES, _MOST_LEVELS = 2**20, 20_000, 20

_NULL = re.compile(r"~|null|Null|NULL")
_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*")
_SPECIAL = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)
_BOOLEANS = {"true": True, "false": False}
_ENV = re.compile(r"oc\.env\s*:\s*([^\s,}]+)")
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
_NULL_TAG, _MERGE_TAG = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _TextLoader(yaml.SafeLoader):
    """A safe YAML loader that reads plain scalars as text or null and refuses duplicate keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [(tag, pattern) for tag, pattern in pairs if tag in (_NULL_TAG, _MERGE_TAG)]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, "duplicate key", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> Any:
    """Parse the YAML ``text`` and return a mapping, list, string or None.

    Error messages do not quote the text, because it may be a file with secrets that was named by mistake.

    Args:
        source: the beginning of error messages, such as the name of the file.

    Raises:
        UserError: if the text is not YAML, is nested too deeply or has too many values.
    """
    try:
        loader = _TextLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = f"{place}{error.problem or error.context}"
        raise UserError(f"{source}: invalid YAML: {reason}") from None
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0]
        raise UserError(f"{source}: invalid YAML: {reason}") from None


def _check_size(root: yaml.Node) -> None:
    """Raise ValueError for a document that exceeds the limits when its aliases are expanded."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, level: int) -> int:
        if level > _MOST_LEVELS:
            raise ValueError(f"more than {_MOST_LEVELS} levels, or an alias that contains itself")
        if id(node) not in sizes:
            children: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                children = node.value
            elif isinstance(node, yaml.MappingNode):
                children = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(size(child, level + 1) for child in children)
        return sizes[id(node)]

    if size(root, 0) > _MOST_VALUES:
        raise ValueError(f"more than {_MOST_VALUES} values after expansion of aliases")


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the ``key: value`` pairs of a YAML file, or {} for an empty file.

    Raises:
        UserError: if the file cannot be read or contains anything else; the message names the file.
    """
    with os_errors(f"{path} cannot be read"), path.open("rb") as file:
        raw = file.read(_MOST_BYTES + 1)
    if len(raw) > _MOST_BYTES:
        raise UserError(f"{path}: too large for a configuration (more than {_MOST_BYTES} bytes)")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8. Save the file as UTF-8") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path}: the file must contain key: value pairs")
    return values


def parse_overrides(items: Iterable[str], source: str) -> dict[str, Any]:
    """Parse overrides of the form ``section.key=value`` and return nested mappings.

    A value that is written as a YAML list, mapping or quoted scalar is parsed. Any other value remains text.

    Args:
        source: the beginning of error messages.

    Raises:
        UserError: for an item without ``=``, and for a key that is used both as a section and with a value.
    """
    values: dict[str, Any] = {}
    for item in items:
        dotted, equals, text = item.partition("=")
        if not equals or not dotted or dotted.startswith("-"):
            raise UserError(f"'{item}': not an override. Write key=value, such as optim.lr=2e-4")
        *sections, key = dotted.split(".")
        inner = values
        for name in sections:
            inner = inner.setdefault(name, {})
            if not isinstance(inner, dict):
                raise UserError(f"{source}: {dotted}: '{name}' already has a value, so it cannot have a key '{key}'")
        inner[key] = _override_value(text, f"{source}: {dotted}")
    return values


def _override_value(text: str, source: str) -> Any:
    trimmed = text.strip()
    if trimmed[:1] + trimmed[-1:] in ("[]", "{}", '""', "''") and len(trimmed) > 1:
        return parse_yaml(trimmed, source)
    return None if _NULL.fullmatch(trimmed) else text


def typed(cls: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with text converted to the types that the keys of the section ``cls`` declare.

    Text that cannot be converted remains text. The section refuses it when it is constructed.
    """
    schemas = key_schemas(cls)
    return {key: _typed(schemas.get(key, {}), value) for key, value in values.items()}


def _typed(schema: Mapping[str, Any], value: Any) -> Any:
    options = schema.get("anyOf", [schema])
    kinds = {option.get("type") for option in options}
    if isinstance(value, list):
        items: Mapping[str, Any] = next((option["items"] for option in options if "items" in option), {})
        return [_typed(items, item) for item in value]
    if not isinstance(value, str):
        return value
    if value == "" and ("null" in kinds or "string" not in kinds):
        return None
    return value if "string" in kinds else _scalar(value.strip())


def _scalar(text: str) -> int | float | bool | str:
    if text.lower() in _BOOLEANS:
        return _BOOLEANS[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) < 400 else text  # Python refuses to convert thousands of digits
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    try:
        return float(text) if text.lower().strip("+-") not in ("inf", "infinity", "nan") else text
    except ValueError:
        return text


def refuse_secrets(key: str, written: str, resolved: str) -> None:
    """Refuse an interpolation that copies a secret from an environment variable into a configuration.

    Args:
        key: the dotted name of the key.
        written: its value as written, with ``${oc.env:NAME}``.
        resolved: its value after interpolation.

    Raises:
        UserError: for a variable with a name that suggests a secret (it contains KEY, TOKEN, SECRET, ...).
    """
    named = [name for name in _ENV.findall(written) if _SECRET.search(name)]
    hidden = [name for name, value in os.environ.items() if _SECRET.search(name) and value and value in resolved]
    if named or hidden:
        name = (named or hidden)[0]
        raise UserError(
            f"{key}: the secret {name} must not be part of a configuration, which is written to the run folder and to"
            f" every checkpoint. Set {name} only in the environment; the library that needs it reads it there"
        )
