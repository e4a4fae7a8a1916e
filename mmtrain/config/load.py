"""Load a :class:`RunConfig` from YAML files and ``key=value`` overrides.

A configuration is a stack of layers: included files, then the file itself, then the command line. Later layers
override earlier ones. An error names the layer that contains the key or value. The sections ``model``, ``data`` and
``task`` have kinds. A later layer may change the kind (``data=synthetic``); keys that the new kind lacks are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmtrain.config.data import DATA
from mmtrain.config.models import MODELS
from mmtrain.config.registry import Registry
from mmtrain.config.schema import TASKS, RunConfig
from mmtrain.config.section import ConfigError, Section
from mmtrain.config.text import parse_overrides, read_mapping, refuse_secrets, typed
from mmtrain.errors import UserError, nearest

#: The sections that have kinds.
REGISTRIES: dict[str, Registry[Any]] = {"model": MODELS, "data": DATA, "task": TASKS}
_COMMAND_LINE = "command line"


@dataclass(frozen=True)
class _Layer:
    source: str
    values: dict[str, Any]


def config_folders() -> list[Path]:
    """Return the folders that are searched for a configuration: ``configs/`` here, then that of the installation."""
    package = Path(__file__).resolve().parents[1]
    shipped = package / "configs"  # in a wheel; in a checkout the folder is next to the package
    candidates = [Path("configs"), shipped if shipped.is_dir() else package.parent / "configs"]
    return [folder for folder in candidates if folder.is_dir()]


def config_names(folders: Iterable[Path] | None = None) -> list[str]:
    """Return the names that ``--config`` accepts, from ``folders`` (default: :func:`config_folders`)."""
    folders = config_folders() if folders is None else folders
    found = {path.relative_to(folder) for folder in folders for path in folder.rglob("*.yaml")}
    return sorted(str(path.with_suffix("")) for path in found if path.parts[0] != "base")


def load_config(name: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Load the configuration ``name`` and apply ``key=value`` overrides.

    Args:
        name: a name in ``configs/``, or the path of a YAML file.

    Raises:
        UserError: for an unknown name, key or kind, and for an invalid value. The message names the file, and the
            nearest valid name if there is one.
    """
    path = _find(name)
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in [*_file_layers(path, ()), _override_layer(overrides)]:
        merged = _add_layer(merged, layer)
        sources |= dict.fromkeys(_flat(layer.values), layer.source)
    merged.setdefault("name", path.stem)
    if merged["name"] in ("", None):
        raise UserError(f"{sources['name']}: name is empty: give a name, or remove the key to use '{path.stem}'")
    for section, registry in REGISTRIES.items():
        if not merged.get(section, {}).get(registry.key):
            raise UserError(f"{path}: {section}.{registry.key} is not set: choose one of {', '.join(registry)}")
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(merged), resolve=True, throw_on_missing=True)
        values = cast(dict[str, Any], resolved)
        flat = _flat(values)
        for key, written in _flat(merged).items():
            if "${" in str(written):
                refuse_secrets(f"{sources.get(key, path)}: {key}", str(written), str(flat[key]))
        return RunConfig(**_typed_values(values))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {error.full_key}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise UserError(f"{path}: an interpolation ${{...}} refers to itself. Replace it by a value") from None
    except ConfigError as error:
        raise UserError(f"{sources.get(error.key, path)}: {error}") from None


def to_yaml(config: RunConfig) -> str:
    """Return the complete configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump()))


def _find(name: str | Path) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"--config {name}: no such file")
    for folder in config_folders():
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    names = config_names()
    known = "\n  ".join(names) if names else "(none: there is no configs/ folder here; give the path of a YAML file)"
    hint = nearest(str(name), names)
    raise UserError(f"--config {name}: no such configuration{hint}\nAvailable configurations:\n  {known}")


def _file_layers(path: Path, seen: tuple[Path, ...]) -> Iterator[_Layer]:
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: circular include: {' -> '.join(p.name for p in (*seen, path))}. Remove one of them")
    values = read_mapping(path)
    include = values.pop("include", [])
    entries = [include] if isinstance(include, str) else include
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise UserError(f"{path}: include: must be the name of a YAML file, or a list of names")
    for entry in entries:
        child = path.parent / entry
        if child.suffix not in (".yaml", ".yml") or not child.is_file():
            raise UserError(f"{path}: include: no such YAML file: {child}")
        yield from _file_layers(child, (*seen, path))
    if seen:  # configurations that include a file do not inherit its name
        values.pop("name", None)
    yield _Layer(str(path), values)


def _override_layer(overrides: Iterable[str]) -> _Layer:
    return _Layer(_COMMAND_LINE, parse_overrides(map(_expand_kind, overrides), _COMMAND_LINE))


def _expand_kind(item: str) -> str:
    """Expand ``data=synthetic`` to ``data.kind=synthetic``, which can be combined with ``data.length=10``."""
    section, _, kind = item.partition("=")
    return f"{section}.{REGISTRIES[section].key}={kind}" if section in REGISTRIES and kind.isidentifier() else item


def _add_layer(merged: dict[str, Any], layer: _Layer) -> dict[str, Any]:
    values = {str(k): v for k, v in layer.values.items()}
    for section, registry in REGISTRIES.items():
        if isinstance(values.get(section), str):
            values[section] = {registry.key: values[section]}
        kind = values[section].get(registry.key) if isinstance(values.get(section), Mapping) else None
        if kind is None:
            continue
        try:
            keep = registry.choose(kind).model_fields
        except ConfigError as error:
            raise UserError(f"{layer.source}: {error}") from None
        if section in merged and merged[section].get(registry.key) != kind:
            merged = merged | {section: {k: v for k, v in merged[section].items() if k in keep}}
    known = _known_keys(
        {**merged, **{name: {**_section(merged, name), **_section(values, name)} for name in REGISTRIES}}
    )
    _refuse_unknown(values, known, layer.source)
    sections = {name: {**_section(merged, name), **value} for name, value in values.items() if known[name]}
    return {**merged, **values, **sections}


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = values.get(name)
    return section if isinstance(section, Mapping) else {}


def _typed_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` with text converted to the type of each key."""
    result = typed(RunConfig, values)
    for name, default in RunConfig():
        registry, section = REGISTRIES.get(name), values.get(name)
        if isinstance(section, Mapping) and isinstance(default, Section):
            cls = registry.choose(section[registry.key]) if registry else type(default)
            result[name] = typed(cls, section)
    return result


def _known_keys(state: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the keys of each section for the kinds selected in ``state``. A key that is not a section has none."""
    known: dict[str, list[str]] = {}
    for name, default in RunConfig():
        registry, chosen = REGISTRIES.get(name), state.get(name)
        kind = chosen.get(registry.key) if registry and isinstance(chosen, Mapping) else None
        section = registry.choose(kind) if registry and kind else type(default)
        known[name] = list(section.model_fields) if issubclass(section, Section) else []
    return known


def _refuse_unknown(values: Mapping[str, Any], known: Mapping[str, list[str]], source: str) -> None:
    leaves = [f"{name}.{key}" for name, keys in known.items() for key in keys] + [n for n in known if not known[n]]
    for name, value in values.items():
        if known.get(name) and not isinstance(value, Mapping):
            raise UserError(f"{source}: {name}={value!r}: {name} is a section. Write {name}.KEY=VALUE")
        wrong = [f"{name}.{key}" for key in value if key not in known[name]] if known.get(name) else []
        for dotted in wrong if name in known else [name]:
            section, _, key = dotted.rpartition(".")
            same = [leaf for leaf in leaves if leaf.split(".")[-1] == (key or dotted)]
            near = [leaf for leaf in leaves if leaf.startswith(f"{section}.")] if section else list(known)
            hint = f"; did you mean '{same[0]}'?" if same else nearest(dotted, near) or nearest(dotted, leaves)
            registry = REGISTRIES.get(section)
            if registry is not None and known[section] == list(registry.base.model_fields):
                hint = f": set {section}.{registry.key} first (known: {', '.join(registry)})"
            raise UserError(f"{source}: unknown key '{dotted}'{hint}")


def differences(old: RunConfig, new: RunConfig, ignore: Iterable[str] = ()) -> list[str]:
    """Return a line ``key: old -> new`` for each key that differs, except the keys and sections in ``ignore``."""
    left, right = _flat(old.model_dump()), _flat(new.model_dump())
    ignored = tuple(ignore)
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key) and not any(key == i or key.startswith(f"{i}.") for i in ignored)
    ]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten the sections: return the values by their dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= {f"{key}.{leaf}": item for leaf, item in value.items()} if isinstance(value, Mapping) else {key: value}
    return found
