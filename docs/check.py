"""Check the documents against the repository: ``python docs/check.py``.

It reads every Markdown file and reports, with file and line:

- links and anchors that lead nowhere;
- commands, options, configurations and keys that do not exist;
- paths and names of the package that do not exist;
- generated pages that are out of date, a README that is too long, and pages that do not open with a question.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from typer.main import get_command

from mmtrain.cli.app import app
from mmtrain.config import DATA, MODELS, TASKS, RunConfig, load_config
from mmtrain.config.section import Section
from mmtrain.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
README_LINES = 110
_FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)*)`(?!`)")
_LINK = re.compile(r"\]\(([^()\s]+)\)")
_PATH = re.compile(r"(?:mmtrain|tests|configs|benchmarks|docs|launch|slurm)/[\w./-]*")
_KEY = re.compile(r"([a-z_]+)\.([a-z_0-9]+)(=.*)?", re.DOTALL)
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")
_OPTION = re.compile(r"--[a-z][a-z-]*")
_SHELL = {"", "sh", "bash", "console", "text"}
_SEPARATORS = {"&&", "||", "|", ";", ">", "<"}
#: Suffixes of files whose names look like configuration keys, such as data.json.
_SUFFIXES = {"json", "jsonl", "md", "py", "yaml", "csv", "sbatch", "png", "tar", "txt", "pt2", "onnx"}
#: Options of other programs that the documents name.
_FOREIGN = {"--kill-on-bad-exit", "--no-build-isolation", "--no-deps"}


class Page:
    """A Markdown file: its prose, code blocks, code spans and anchors, each with its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        blank = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), self.text)
        self.prose = blank
        self.spans = [(self.line(blank, m.start()), " ".join(m[1].split())) for m in _SPAN.finditer(blank)]
        self.fences = [(self.line(self.text, m.start()), m[2], m[3]) for m in _FENCE.finditer(self.text)]

    @staticmethod
    def line(text: str, offset: int) -> int:
        return text.count("\n", 0, offset) + 1

    @property
    def anchors(self) -> set[str]:
        """Return the anchors of the headings, as GitHub makes them."""
        found: dict[str, int] = {}
        for heading in re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE):
            slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            count = found.get(slug, -1) + 1
            found[slug] = count
            if count:
                found[f"{slug}-{count}"] = 0
        return set(found)

    def commands(self) -> Iterator[tuple[int, str]]:
        """Yield the lines of shell blocks, indented commands, and code spans."""
        for start, kind, block in self.fences:
            if kind in _SHELL:
                joined, number = "", start
                for offset, line in enumerate(block.splitlines(), start + 1):
                    number = number if joined else offset
                    joined += line.removesuffix("\\")
                    if not line.endswith("\\"):
                        yield number, joined.strip().removeprefix("$ ")
                        joined = ""
        for number, line in enumerate(self.prose.splitlines(), 1):
            if line.startswith("    "):
                yield number, line.strip()
        yield from self.spans


def check(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the description of every problem of a Markdown file."""
    page = Page(path)
    yield from _links(page)
    if path.parent != ROOT:
        yield from _question(page)
    if path in {made.PAGE for made in _generators()}:
        return
    for line, command in page.commands():
        for problem in _command(command):
            yield line, f"`{command}`: {problem}"
    for line, span in page.spans:
        yield from ((line, problem) for problem in _span(span))
    for found in re.finditer(r"`(mmtrain/[\w/]+\.py)`: `([\w.]+)`", page.prose):
        defined = [re.compile(rf"\b(def|class) {name}\b|^{name}\b", re.MULTILINE) for name in found[2].split(".")]
        code = (ROOT / found[1]).read_text(encoding="utf-8") if (ROOT / found[1]).is_file() else ""
        if not all(pattern.search(code) for pattern in defined):
            yield page.line(page.prose, found.start()), f"{found[1]} does not define {found[2]}"
    for start, kind, block in page.fences:
        if kind == "python":
            yield from ((start + line, problem) for line, problem in _imports(block))


def _links(page: Page) -> Iterator[tuple[int, str]]:
    for found in _LINK.finditer(page.prose):
        target, _, anchor = found[1].partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        line, file = page.line(page.prose, found.start()), (page.path.parent / target if target else page.path)
        if not file.exists():
            yield line, f"the link leads to {target}, which does not exist"
        elif anchor and anchor not in Page(file).anchors:
            yield line, f"the link leads to #{anchor}, which is not a heading of {file.name}"


def _question(page: Page) -> Iterator[tuple[int, str]]:
    paragraphs = [part.strip() for part in page.text.split("\n\n")]
    if len(paragraphs) < 2 or not paragraphs[0].startswith("# ") or not paragraphs[1].rstrip("*").endswith("?"):
        yield 3, "the page does not open with its question: write it below the title, in one line in italics"


def _command(text: str) -> Iterator[str]:
    """Yield the errors of a shell line, if it runs a command of this repository."""
    try:
        lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:
        return  # prose in a code span, such as an apostrophe
    simple: list[str] = []
    for word in [*words, ";"]:
        if word in _SEPARATORS:
            yield from _simple_command(simple)
            simple = []
        else:
            simple.append(word)
        if " exec mmtrain " in word:
            yield from _command(word.partition(" exec ")[2])


def _simple_command(words: list[str]) -> Iterator[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    match words:
        case ["mmtrain", *rest] | ["python", "-m", "mmtrain", *rest]:
            yield from _mmtrain(rest)
        case ["python", "launch/submit.py", *rest]:
            yield from _mmtrain(["submit", *rest])
        case ["python", "-m", module, *rest] if module.split(".")[0] in ("tests", "mmtrain"):
            yield from _script(Path(*module.split(".")).with_suffix(".py"), rest)
        case ["python", script, *rest] if script.endswith(".py"):
            yield from _script(Path(script), rest)
        case ["make", *targets] if len(targets) < 3:
            known = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            yield from (f"the Makefile has no target {target}" for target in targets if target not in known)


def _mmtrain(words: list[str]) -> Iterator[str]:
    """Yield the errors in the arguments of ``mmtrain``."""
    command: Any = _cli()
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        if _is_placeholder(words[0]):
            return
        if words[0] not in command.commands:
            if "list" in command.commands:  # `mmtrain runs ROOT`
                break
            yield f"there is no command {words[0]}"
            return
        command, words = _subcommand(command, words[0]), words[1:]
    if hasattr(command, "commands") and "list" in command.commands:
        command = _subcommand(command, "list")
    options = {name: param for param in command.params for name in (*param.opts, *param.secondary_opts)}
    options["--help"] = None
    positional, config = [], None
    words = list(words)
    while words:
        name, given, value = words.pop(0).partition("=")
        if name in ("[]", "[", "]", "...") or not name.startswith("-") or _is_placeholder(name):
            positional.append(name + given + value)
        elif name not in options:
            yield f"there is no option {name}"
        elif not given and options[name] is not None and not getattr(options[name], "is_flag", False):
            value = words.pop(0) if words else ""
        config = value if name in ("--config", "-c") else config
    if positional and not any(param.param_type_name == "argument" for param in command.params):
        yield f"the command takes no argument {positional[0]}"
    overrides = [word for word in positional if _OVERRIDE.match(word)]
    prefix = "model." if command is _subcommand(_cli(), "model") else ""  # `mmtrain model NAME dims=[8,8]`
    yield from _configuration(config, [word if "." in word.partition("=")[0] else prefix + word for word in overrides])


def _configuration(name: str | None, overrides: list[str]) -> Iterator[str]:
    """Yield the errors in a configuration and its overrides."""
    wrong = [problem for word in overrides for problem in _key(word)]
    yield from wrong
    if wrong or not name or _is_placeholder(name):
        return
    file = ROOT / "configs" / f"{name}.yaml"
    if not file.is_file():
        yield f"there is no configuration {name}"
        return
    try:
        load_config(str(file), [word for word in overrides if not _is_placeholder(word)])
    except UserError as error:
        yield str(error)


def _key(word: str) -> Iterator[str]:
    section, _, key = word.partition("=")[0].partition(".")
    if section not in _keys() or (key and key not in _keys()[section]):
        yield f"there is no configuration key {section}.{key}" if key else f"there is no configuration key {section}"


def _script(path: Path, words: list[str]) -> Iterator[str]:
    if not (ROOT / path).is_file():
        yield f"{path} does not exist"
        return
    known = _script_options(ROOT / path)
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            yield f"{path} has no option {option}"
        elif _OVERRIDE.match(word):
            yield from _key(word)


def _span(span: str) -> Iterator[str]:
    """Yield the errors in a code span that is a path, a name of the package, a key or an option."""
    if _PATH.fullmatch(span) and not (ROOT / span).exists():
        yield f"{span} does not exist"
    elif re.fullmatch(r"mmtrain(\.\w+)+", span):
        yield from _dotted(span)
    elif found := _KEY.fullmatch(span):
        if found[1] in _keys() and (found[3] or found[2] not in _SUFFIXES):
            yield from _key(span)
    elif _OPTION.fullmatch(span.split()[0].partition("=")[0]):
        option = span.split()[0].partition("=")[0]
        if option not in _all_options() | _FOREIGN:
            yield f"no command has the option {option}"


def _imports(code: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmtrain"):
            for alias in node.names:
                for problem in _dotted(f"{node.module}.{alias.name}"):
                    yield node.lineno, problem


def _dotted(name: str) -> Iterator[str]:
    """Yield a problem if a dotted name is neither a module of the package nor a name in one."""
    path, rest = ROOT, name.split(".")
    while rest and (path / rest[0]).is_dir():
        path /= rest.pop(0)
    if rest and (path / f"{rest[0]}.py").is_file():
        path /= f"{rest.pop(0)}.py"
    file = path if path.is_file() else path / "__init__.py"
    code = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not all(re.search(rf"\b{part}\b", code) for part in rest):
        yield f"{name} does not exist: {file.relative_to(ROOT)} does not name {'.'.join(rest)}"


def _is_placeholder(word: str) -> bool:
    """Return whether a word is a placeholder: RUN, [ROOT], KEY=VALUE, or an ellipsis."""
    return "…" in word or "..." in word or re.fullmatch(r"\[?[A-Z][A-Z_]*\]?(=.*)?", word) is not None


@cache
def _cli() -> Any:
    return get_command(app)


_COMMANDS: dict[tuple[int, str], Any] = {}


def _subcommand(group: Any, name: str) -> Any:
    """Return a command of a group; each is built once, because that imports its module."""
    key = (id(group), name)
    if key not in _COMMANDS:
        _COMMANDS[key] = group.commands[name]
    return _COMMANDS[key]


@cache
def _all_options() -> set[str]:
    """Return the options of all commands and benchmarks."""
    found = {option for file in (ROOT / "benchmarks").glob("*.py") for option in _script_options(file)}
    waiting = [_cli()]
    while waiting:
        command = waiting.pop()
        waiting += [_subcommand(command, name) for name in getattr(command, "commands", ())]
        found |= {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    return found


@cache
def _script_options(file: Path) -> set[str]:
    """Return the options that a script of this repository declares with argparse."""
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', file.read_text(encoding="utf-8"))) | {"--help"}


@cache
def _keys() -> dict[str, set[str]]:
    """Return the keys of each section, of all its kinds together; a key at the top has none."""
    keys: dict[str, set[str]] = {name: set() for name in RunConfig.model_fields}
    for name, value in RunConfig():
        if isinstance(value, Section):
            keys[name] |= set(type(value).model_fields)
    for name, registry in (("model", MODELS), ("data", DATA), ("task", TASKS)):
        for kind in registry:
            keys[name] |= set(registry[kind].model_fields)
    return keys


@cache
def _generators() -> tuple[Any, ...]:
    """Return the modules that write pages, ``make_*_reference.py``."""
    folder = Path(__file__).resolve().parent
    sys.path.insert(0, str(folder))
    return tuple(import_module(file.stem) for file in sorted(folder.glob("make_*_reference.py")))


def problems() -> Iterator[str]:
    """Yield one line for every problem of the repository's documents."""
    for made in _generators():
        name = made.PAGE.relative_to(ROOT)
        if not made.PAGE.is_file() or made.PAGE.read_text(encoding="utf-8") != made.page():
            yield f"{name}:1: the page is out of date: run python docs/{made.__name__}.py"
    length = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    if length > README_LINES:
        yield f"README.md:{README_LINES + 1}: the file has {length} lines, more than {README_LINES}"
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]):
        yield from (f"{path.relative_to(ROOT)}:{line}: {problem}" for line, problem in check(path))


if __name__ == "__main__":
    found = list(problems())
    print("\n".join(found) or "docs-check: all documents are consistent")
    sys.exit(1 if found else 0)
