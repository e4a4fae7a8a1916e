"""Which test files are responsible for a mutant, by what they import and mention."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tests.mutants.operators import Mutant

ROOT = Path(__file__).resolve().parents[2]
#: Test folders that are responsible for a package, after the files that import the mutated module.
FOLDERS = {
    "train": ["train", "parallel"],
    "tasks": ["train", "models"],
    "models": ["models", "inspect"],
    "runs": ["cluster", "cli", "train"],
    "cluster": ["cluster", "slurm"],
    "data": ["data", "train"],
    "ops": ["ops"],
}


def named_modules(text: str) -> set[str]:
    """The modules of mmtrain that a text names; names that are imported from a package count as modules, too."""
    names = set(re.findall(r"mmtrain(?:\.\w+)+", text))
    for package, plain, bracketed in re.findall(r"from (mmtrain[\w.]*) import (?:([\w, ]+)|\(([^)]*)\))", text):
        names |= {f"{package}.{name.split()[0]}" for name in (plain or bracketed).split(",") if name.split()}
    return names


@cache
def test_files() -> dict[str, tuple[str, set[str]]]:
    """Each test file: its text, and the modules that it names, helpers in its folder included."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        helpers = re.findall(r"^(?:from|import) ([a-z_]+)\b", text, re.M)
        whole = text + "".join(f.read_text() for h in helpers if (f := path.parent / f"{h}.py").is_file())
        found[str(path.relative_to(ROOT))] = whole, named_modules(whole)
    return found


@cache
def distances(module: str) -> dict[str, int]:
    """The modules that import ``module``, directly (1) or through others (2, 3, ...)."""
    texts = {_module(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "mmtrain").rglob("*.py")}
    imports = {name: named_modules(text) & texts.keys() for name, text in texts.items()}
    found, border = {module: 0}, {module}
    while border:
        border = {name for name, used in imports.items() if used & border} - found.keys()
        found |= dict.fromkeys(border, max(found.values()) + 1)
    return found


def _module(path: Path) -> str:
    return str(path.with_suffix("")).removesuffix("/__init__").replace("/", ".")


def mutant_tests(mutant: Mutant) -> list[tuple[list[str], str | None]]:
    """Groups of test files and marks, in the order in which to run them."""
    if mutant.tests:
        return [([test], None) for test in mutant.tests]
    away = distances(_module(Path(mutant.path)))
    words = [word for word in mutant.function.split(".") if len(word) > 4 and not word.startswith("__")]
    folders = [f"tests/{name}/" for name in FOLDERS[mutant.path.split("/")[1]]]
    ranked = []
    for name, (text, names) in test_files().items():
        hops = min((away[found] for found in names if found in away), default=9)
        said = any(re.search(rf"\b{re.escape(word.lstrip('_'))}\b", text) for word in words)
        near = next((len(folders) - i for i, folder in enumerate(folders) if name.startswith(folder)), 0)
        score = 2 * max(4 - hops, 0) + 3 * said + near
        if near or hops <= 1 or (said and hops < 9):
            ranked.append((-score, len(text), name))
    files = [name for _, _, name in sorted(ranked)]
    near_files = [name for score, _, name in sorted(ranked) if score <= -8][:3]
    fast, slow = "not slow and not timed", "slow and not timed"
    groups = [(files[:4], fast), (files[4:16], fast), (near_files, slow)]
    return [(some, marks) for some, marks in groups if some]
