"""The house stands as docs/design.md draws it."""

import ast
from pathlib import Path

import pytest

import memplan

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "profiler": {"profiler"},
    "offload": {"offload"},
    "tui": {"tui", "offload"},
    "memplan": {"memplan", "tui", "offload", "profiler"},
}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]
DATA_FILES = ("profiler/profile.py", "offload/plan.py", "offload/events.py")


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_goes_upwards(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert imported(path) & MAY_IMPORT.keys() <= MAY_IMPORT[package]


@pytest.mark.parametrize("name", DATA_FILES)
def test_data_that_others_read_needs_no_framework(name: str) -> None:
    assert not imported(ROOT / name) & {"torch", "numpy", "textual", "rich"}


def test_every_public_name_is_there() -> None:
    assert all(hasattr(memplan, name) for name in memplan.__all__)


@pytest.mark.parametrize("path", [p for p in FILES if p.name != "__init__.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
