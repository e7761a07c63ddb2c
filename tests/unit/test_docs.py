"""Documents name files and tests that are there: in the text, in links, and in the tree of ``docs/architecture.md``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FOLDERS = ("benchmarks", "configs", "docs", "tests", "torchspec")
PATH = re.compile(rf"(?<![\w/.~-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w/*]")
MODULE = re.compile(r"(?<![\w./])(?:torchspec|benchmarks|tests)(?:\.\w+)+")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
TREE = re.compile(r"```tree\n(.*?)```", re.DOTALL)


def named_paths(document: Path) -> Iterator[Path]:
    text = document.read_text()
    yield from (ROOT / path for path in PATH.findall(text))
    yield from (document.parent / link for link in LINK.findall(text))
    for name in MODULE.findall(text):
        path = ROOT / name.replace(".", "/")
        module = path.with_suffix(".py")
        owner = path.parent.with_suffix(".py")  # of a function or class
        yield next((there for there in (path, module, owner) if there.exists()), module)


def tree_paths(text: str) -> Iterator[Path]:
    """Paths of a drawn tree: names up to the first wide gap of a line, inside the folder that is indented less."""
    folders: list[Path] = []
    for line in text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.split(r"  +", line.strip())[0].split()
        del folders[depth:]
        yield from (Path(*folders, name) for name in names)
        folders.append(Path(names[-1]))


def missing(paths: Iterator[Path]) -> set[str]:
    """Those that are not there; a pattern must match something."""
    return {str(path) for path in paths if not any(Path("/").glob(str(path.resolve())[1:]))}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_that_a_document_names_exist(document: Path) -> None:
    assert missing(named_paths(document)) == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_a_document_names_exist(document: Path) -> None:
    for file, name in TEST.findall(document.read_text()):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_the_tree_is_the_one_that_is_there() -> None:
    (tree,) = TREE.findall((ROOT / "docs" / "architecture.md").read_text())
    paths = list(tree_paths(tree))
    assert missing(ROOT / path for path in paths) == set()
    packages = {path.parent.relative_to(ROOT) for path in ROOT.glob("torchspec/*/__init__.py")}
    assert packages <= set(paths), "packages that the tree leaves out"


def test_a_path_that_is_not_there_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "`torchspec/no_such.py`, [link](gone.md), `python -m torchspec.gone.module`, `benchmarks/results/gone_*.json`;"
        "`~/.cache/torchspec/x`, `torchspec/contracts.py`, [site](https://host/docs/x), `torchspec.contracts.Lease`"
    )
    found = {path.rpartition("/")[2] for path in missing(named_paths(document))}
    assert found == {"no_such.py", "gone.md", "module.py", "gone_*.json"}
    assert [str(path) for path in tree_paths("a/   x\n  b.py c/  y\n    d.py\n  e.py\nf/")] == [
        *("a", "a/b.py", "a/c", "a/c/d.py", "a/e.py", "f"),
    ]
