"""docs/check.py finds every kind of mistake in a page, and none in the documents of the repository."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT

#: A line of a page, and a part of the message about it; "" where the line is right.
LINES = [
    ("[a](nowhere.md)", "nowhere.md, which does not exist"),
    ("[a](#nothing)", "#nothing, which is not a heading"),
    ("[a](#a-title) and [b](https://example.org/nowhere)", ""),
    ("`mmtrain trian --config NAME`", "no command trian"),
    ("`mmtrain data index SHARDS --widow 2`", "no option --widow"),
    ("`mmtrain doctor here`", "takes no argument here"),
    ("`mmtrain submit --config tsm2_nothing --local 2`", "no configuration tsm2_nothing"),
    ("`mmtrain submit --config tsm2_etth1 optim.rate=1`", "no configuration key optim.rate"),
    ("`mmtrain plan --config tsm2_etth1 train.batch_size=many`", "train.batch_size"),
    ("`mmtrain model vim2_tiny widths=[8]`", "no configuration key model.widths"),
    ("`mmtrain model vim2_tiny num_classes=3 --input-size 64`, `mmtrain runs ROOT`, `mmtrain runs stop RUN…`", ""),
    ("`python launch/submit.py --config tsm2_etth1 --lokal 2`", "no option --lokal"),
    ("`cd x && python benchmarks/nothing.py`", "benchmarks/nothing.py does not exist"),
    ("`python benchmarks/scan_cpu.py --fast`", "has no option --fast"),
    ("`python -m tests.hostile.fuzz --minutes 1`, `python benchmarks/scan_cpu.py --smoke`", ""),
    ("`make tests`", "no target tests"),
    ("`train.epoch=3`", "no configuration key train.epoch"),
    ("`train.epochs`, `data.json`", ""),
    ("`--nowhere`", "no command has the option --nowhere"),
    ("`mmtrain/nothing.py`", "mmtrain/nothing.py does not exist"),
    ("`mmtrain.data.nothing`", "mmtrain.data.nothing does not exist"),
    ("`mmtrain/train/loop.py`: `Trainer.nothing`", "does not define Trainer.nothing"),
    ("`mmtrain/train/loop.py`: `Trainer.fit`", ""),
    ("    mmtrain data fetch etth1", "no command fetch"),
]
BLOCK = """```
$ mmtrain submit --config tsm2_etth1 \\
    --nowhere
```
```python
from mmtrain.models import nothing
```
"""


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return import_module("check")
    finally:
        sys.path.remove(str(ROOT / "docs"))


def check(checker: ModuleType, page: Path, text: str) -> list[tuple[int, str]]:
    page.write_text(f"# A title\n\n{text}\n", encoding="utf-8")
    return list(checker.check(page))


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line for line, _ in LINES])
def test_a_line_of_a_page(checker: ModuleType, tmp_path: Path, line: str, message: str) -> None:
    found = check(checker, tmp_path / "page.md", f"*Is it right?*\n\n{line}")
    assert [number for number, _ in found] == ([5] if message else [])
    assert all(message in problem for _, problem in found)


def test_blocks_and_the_question(checker: ModuleType, tmp_path: Path) -> None:
    found = check(checker, tmp_path / "page.md", f"Prose.\n\n{BLOCK}")
    assert [number for number, _ in found] == [3, 6, 10]
    for (_, problem), part in zip(found, ("question", "--nowhere", "mmtrain.models.nothing"), strict=True):
        assert part in problem


def test_the_documents_of_the_repository(checker: ModuleType) -> None:
    assert not list(checker.problems())


def test_a_page_that_is_out_of_date_and_a_long_readme(
    checker: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("line\n" * 111)
    (tmp_path / "docs").mkdir()
    for made in checker._generators():
        monkeypatch.setattr(made, "PAGE", tmp_path / "docs" / made.PAGE.name)
    monkeypatch.setattr(checker, "ROOT", tmp_path)
    found = list(checker.problems())
    assert found[0].startswith("docs/cli.md:1: the page is out of date")
    assert found[1].startswith("docs/config.md:1: the page is out of date")
    assert found[2].startswith("README.md:111: the file has 111 lines")
