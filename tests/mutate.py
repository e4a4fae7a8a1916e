"""Mutation testing: change one place of the code at a time and see whether a test fails.

    python -m tests.mutate --sample 150 --seed 0

mutmut and cosmic-ray are not used: mutmut chooses tests by running the whole suite once, cosmic-ray starts a process
for every mutant (4 s of imports), and neither samples by a seed. This driver works in a copy of the tree, never in the
checkout. Each mutant runs the test files that import or mention what it changes, the most specific first, fast tests
before slow ones, in a forked process that has torch and pytest imported already but nothing of mmtrain.

Kernels are changed by the list `mutants/kernels.toml`. `mutants/equivalent.toml` lists mutants that change no
behaviour, each with the reason; they do not count.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import tempfile
import time
import tomllib
from pathlib import Path

from tests.mutants.operators import Mutant, mutants_of
from tests.mutants.tree import PRELOAD, Tree

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "tests" / "mutants"
SCOPE = ["train", "tasks", "models", "runs", "cluster", "data/core", "data/series"]


def all_mutants(only: str | None) -> list[Mutant]:
    """Every mutant of the scope or of the file or folder ``only``."""
    folders = [Path(only)] if only else [Path("mmtrain") / name for name in SCOPE]
    found: list[Mutant] = []
    for folder in folders:
        files = [ROOT / folder] if folder.suffix == ".py" else sorted((ROOT / folder).rglob("*.py"))
        for path in files:
            found += mutants_of(str(path.relative_to(ROOT)), path.read_bytes())
    return found


def kernel_mutants() -> list[Mutant]:
    """The patches of the list; raises ValueError where the text to replace is not in the file exactly once."""
    found = []
    for patch in tomllib.loads((LISTS / "kernels.toml").read_text())["patch"]:
        source, old, new = (ROOT / patch["file"]).read_bytes(), patch["old"].encode(), patch["new"]
        if source.count(old) != 1:
            raise ValueError(f"kernels.toml: {patch['old']!r} is {source.count(old)} times in {patch['file']}")
        begin, key = source.index(old), f"{patch['file']}: {patch['old']} -> {new}"
        found.append(Mutant(key, patch["file"], "", begin, begin + len(old), new, patch["old"], tuple(patch["tests"])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Mutation testing of mmtrain.")
    parser.add_argument("--sample", type=int, default=150, help="number of mutants of Python code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a file or folder, e.g. mmtrain/train")
    parser.add_argument("--kernels", action="store_true", help="the kernels' patches instead of a sample")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time; the same command continues")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one mutant")
    parser.add_argument("--again", action="store_true", help="run the survivors of the results again")
    parser.add_argument("--results", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its own copy of the tree")
    parser.add_argument("--list", action="store_true", help="only print the mutants")
    options = parser.parse_args()
    known = tomllib.loads((LISTS / "equivalent.toml").read_text()).get("mutant", [])
    equivalent = {entry["key"]: entry["reason"] for entry in known}
    if options.kernels:
        chosen = kernel_mutants()
    else:  # by a hash of its text: a change elsewhere leaves a mutant in the sample
        order = {m.key: hashlib.sha256(f"{options.seed} {m.key}".encode()).digest() for m in all_mutants(options.only)}
        chosen = sorted(all_mutants(options.only), key=lambda m: order[m.key])[: options.sample]
    if options.list:
        print("\n".join(mutant.key for mutant in chosen))
        return
    for name in PRELOAD:
        importlib.import_module(name)
    found = read_results(options.results)
    again = {key for key, entry in found.items() if options.again and entry["caught"] is None}
    todo = [m for m in chosen if m.key not in equivalent and (m.key not in found or m.key in again)]
    end = time.monotonic() + 60 * options.minutes
    jobs = []
    for job in range(options.jobs):
        if child := os.fork():
            jobs.append(child)
            continue
        with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
            work(Tree(Path(folder)), todo[job :: options.jobs], options.results, options.limit, end)
        os._exit(0)
    for child in jobs:
        os.waitpid(child, 0)
    tell(chosen, read_results(options.results), equivalent)


def work(tree: Tree, mutants: list[Mutant], results: Path, limit: float, end: float) -> None:
    """Run ``mutants`` until ``end`` and append a line of JSON for each to ``results``."""
    for mutant in mutants:
        if (began := time.monotonic()) > end:
            break
        try:
            caught = tree.caught_by(mutant, limit)
        except TimeoutError:
            print(f"NO TIME  {mutant.key}", flush=True)
            continue
        line = {"key": mutant.key, "caught": caught, "seconds": round(time.monotonic() - began, 1)}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{'caught' if caught else 'SURVIVED'} {mutant.key}   [{caught}]", flush=True)


def read_results(file: Path) -> dict[str, dict[str, str | None]]:
    """The last result of each mutant, by its key."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def tell(chosen: list[Mutant], results: dict[str, dict[str, str | None]], equivalent: dict[str, str]) -> None:
    """Print the survivors with their change, and the score."""
    counted = [m for m in chosen if m.key not in equivalent and m.key in results]
    alive = [m for m in counted if results[m.key]["caught"] is None]
    for mutant in alive:
        print(f"\n{mutant.path} {mutant.function}\n- {mutant.old}\n+ {mutant.new}")
    same = sum(m.key in equivalent for m in chosen)
    caught = len(counted) - len(alive)
    share = 100 * caught / max(len(counted), 1)
    rest = len(chosen) - len(counted) - same
    print(f"\n{caught} of {len(counted)} caught ({share:.0f} %), {same} equivalent, {rest} not run")


if __name__ == "__main__":
    main()
