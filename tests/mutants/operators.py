"""The mutants of a Python file: small changes of its syntax tree, each a replaced stretch of the source."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "ceil": "floor"}
#: Arguments that only check, or that this platform ignores.
IDLE_ARGUMENTS = {"strict", "encoding", "stacklevel", "description", "help", "prefix", "desc"}
#: Calls whose arguments are words for people or types.
IDLE_CALLS = {"cast", "TypeVar", "ParamSpec", "Field", "debug", "info", "getLogger"}


@dataclass(frozen=True)
class Mutant:
    """``source[begin:end]`` becomes ``new``, within ``function``. ``tests``: those to run, else they are looked up."""

    key: str
    path: str
    function: str
    begin: int
    end: int
    new: str
    old: str
    tests: tuple[str, ...] = ()

    def apply(self, source: bytes) -> bytes:
        return source[: self.begin] + self.new.encode() + source[self.end :]


def mutants_of(path: str, source: bytes) -> list[Mutant]:
    """All mutants of one file, in its order."""
    lines = source.split(b"\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    found, seen = [], Counter[str]()
    for node, new, function in _walk(ast.parse(source), ""):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        old = source[begin:end].decode()
        first = lines[node.lineno - 1].decode().strip()
        where = "" if old == first else f" in {first}"
        key = f"{path}:{function}: {' '.join(old.split())[:100]} -> {' '.join(new.split())[:100]}{where}"
        seen[key] += 1
        key += f" #{seen[key]}" if seen[key] > 1 else ""
        found.append(Mutant(key, path, function, begin, end, new, old))
    return found


def _walk(node: ast.AST, function: str) -> Iterator[tuple[ast.expr | ast.stmt, str, str]]:
    """Each changed node below ``node``, its new text, and the name of its function."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}".lstrip(".")
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "decorator_list", "format_spec"} or (name == "exc" and value is not None):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or _idle(child):
                continue
            if name == "test" and isinstance(child, ast.Name | ast.Attribute | ast.Call):
                yield child, f"(not {ast.unparse(child)})", function
            if isinstance(child, ast.expr | ast.stmt):
                for new in _changes(child):
                    yield child, new, function
            yield from _walk(child, function)


def _idle(node: ast.AST) -> bool:
    """Whether a change below ``node`` says nothing about behaviour."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Expr):
        return _idle(node.value)
    if isinstance(node, ast.Call):
        called = node.func
        name = called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""
        return name in IDLE_CALLS
    return isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Assert)


def _changes(node: ast.expr | ast.stmt) -> Iterator[str]:
    """The texts that may stand for ``node``."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
        yield _text(ast.Compare(node.left, [COMPARE[type(node.ops[0])]()], node.comparators))
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_text(node):
        yield _text(ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right))
    elif isinstance(node, ast.BoolOp):
        yield _text(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield _text(node.operand)
    elif isinstance(node, ast.Constant):
        yield from _constants(node.value)
    elif isinstance(node, ast.IfExp):
        yield _text(ast.IfExp(node.test, node.orelse, node.body))
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            if name in NAMES:
                other = NAMES[name]
                called = ast.Name(other) if isinstance(node.func, ast.Name) else ast.Attribute(node.func.value, other)
                yield _text(ast.Call(called, node.args, node.keywords))
        for i, word in enumerate(node.keywords):
            if word.arg not in IDLE_ARGUMENTS and word.arg is not None:
                yield _text(ast.Call(node.func, node.args, node.keywords[:i] + node.keywords[i + 1 :]))
    elif isinstance(node, ast.Return):
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            yield "return None"
    elif (
        isinstance(node, ast.Raise | ast.Continue | ast.Break | ast.AugAssign)
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        or (isinstance(node, ast.Assign) and not isinstance(node.targets[0], ast.Name | ast.Tuple))
    ):
        yield "pass"


def _deletable(node: ast.stmt) -> bool:
    """Whether the code compiles without it; names that are assigned stay, as their loss is always seen."""
    if isinstance(node, ast.Assign):
        return not isinstance(node.targets[0], ast.Name | ast.Tuple)
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return call or isinstance(node, ast.Raise | ast.Continue | ast.Break | ast.AugAssign)


def _constants(value: object) -> Iterator[str]:
    if isinstance(value, bool):
        yield str(not value)
    elif isinstance(value, int):
        yield str(value + 1)
        if value:
            yield str(value - 1)
    elif isinstance(value, float):
        yield repr(value * 2) if value else "1.0"


def _is_text(node: ast.BinOp) -> bool:
    """Whether it joins strings or lists."""
    texts = ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp
    return any(
        isinstance(side, texts) or (isinstance(side, ast.Constant) and isinstance(side.value, str))
        for side in (node.left, node.right)
    )


def _text(node: ast.expr) -> str:
    return f"({ast.unparse(ast.fix_missing_locations(node))})"
