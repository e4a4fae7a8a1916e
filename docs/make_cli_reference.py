"""Write docs/cli.md from the help texts of the commands: ``python docs/make_cli_reference.py [--check]``."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from reference_page import main, markdown, table
from typer.main import get_command

from mmtrain.cli.app import app

PAGE = Path(__file__).with_name("cli.md")
_HEAD = """# Commands

*Which commands are there, and which options do they take?*

This page is generated from the help texts by `python docs/make_cli_reference.py`: do not edit it. `mmtrain COMMAND
--help` prints the same. If its input is wrong, a command prints one message and exits with status 2.
"""
_TYPES = {int: "integer", float: "number", str: "text", Path: "path", bool: "flag"}


def page() -> str:
    """Return the whole page."""
    root = get_command(app)
    lines = [_HEAD, *_contents(root)]
    lines += ["\n## Common commands\n", *_code(_split(root.help)[1])]
    for name, command in _children(root):
        lines += _section(f"mmtrain {name}", command, "##")
    return "\n".join(lines).rstrip() + "\n"


def _children(group: Any) -> list[tuple[str, Any]]:
    return [(name, group.commands[name]) for name in group.list_commands(None)]


def _contents(root: Any) -> Iterator[str]:
    """Yield a table of all commands, with links to their sections."""
    rows = [
        (f"[`{path}`](#{path.replace(' ', '-')})", _summary(command)) for path, command in _commands("mmtrain", root)
    ]
    yield from table(("command", "description"), rows)


def _commands(path: str, group: Any) -> Iterator[tuple[str, Any]]:
    """Yield the path and the object of every command below ``group`` that is not a group itself."""
    for name, command in _children(group):
        if hasattr(command, "commands"):
            yield from _commands(f"{path} {name}", command)
        else:
            yield f"{path} {name}", command


def _summary(command: Any) -> str:
    return markdown(_split(command.help)[0].split("\n\n")[0].replace("\n", " "))


def _section(path: str, command: Any, level: str) -> Iterator[str]:
    """Yield the section of a command, or that of a group and of its commands."""
    text, examples = _split(command.help)
    yield f"{level} {path}\n"
    yield markdown(text) + "\n"
    if hasattr(command, "commands"):
        yield from _code(examples)
        for name, child in _children(command):
            yield from _section(f"{path} {name}", child, level + "#" if level == "##" else level)
        return
    yield from _code(_usage(path, command.params))
    if examples:
        yield "Examples:\n"
        yield from _code(examples)
    if command.params:
        types = get_type_hints(command.callback)
        rows = [(_names(p), _type(types.get(p.name)), _default(p), p.help or "") for p in command.params]
        yield from table(("argument or option", "type", "default", "description"), rows)
        yield ""


def _split(help: str | None) -> tuple[str, str]:
    """Split a help text into its paragraphs and the lines of its examples."""
    text, _, examples = inspect.cleandoc(help or "").partition("\b\nExamples:\n")
    return text.strip(), textwrap.dedent(examples).strip()


def _code(lines: str) -> Iterator[str]:
    if lines:
        yield f"```\n{lines}\n```\n"


def _is_argument(param: Any) -> bool:
    return not param.opts[0].startswith("-")


def _metavar(param: Any) -> str:
    name = (param.metavar or param.name.upper()).strip("[].")
    return f"{name}..." if param.nargs == -1 else name


def _usage(path: str, params: list[Any]) -> str:
    arguments = [param for param in params if _is_argument(param)]
    options = [param for param in params if not _is_argument(param)]
    required = [f"{param.opts[0]} {_metavar(param)}" for param in options if param.required]
    more = ["[OPTIONS]"] if len(required) < len(options) else []
    given = [_metavar(param) if param.required else f"[{_metavar(param)}]" for param in arguments]
    return " ".join([path, *required, *more, *given])


def _names(param: Any) -> str:
    if _is_argument(param):
        return f"`{_metavar(param)}`"
    return ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))


def _type(hint: Any) -> str:
    """Return the name of a parameter's type; ``None`` among the choices means that it may be left out."""
    choices = [choice for choice in get_args(hint) if choice is not NoneType]
    if get_origin(hint) is list:
        return f"{_type(choices[0])}, repeatable"
    return _type(choices[0]) if choices else _TYPES.get(hint, "")


def _default(param: Any) -> str:
    if param.required:
        return "required"
    if param.default is None or param.default is False:
        return ""
    return f"`{param.opts[0]}`" if param.default is True else f"`{param.default}`"


if __name__ == "__main__":
    main(PAGE, page)
