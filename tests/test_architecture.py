"""Imports point one way: each part of the package knows only parts below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# from the lowest to the highest, as in CONTRIBUTING.md ("How the parts fit")
FLOORS = (
    ("runtime", "kernels", "argument_names"),
    ("options",),
    ("weights",),
    ("graph",),
    ("reference",),
    ("operators",),
    ("backends",),
    ("arguments",),
    ("functional",),
    ("nn", "checks"),
    ("compat",),
    ("experiments",),
    ("bench",),
    ("cli",),
)
RANK = {part: rank for rank, parts in enumerate(FLOORS) for part in parts}
# what a part must not know, though it lies below
FORBIDDEN = {
    "checks": {"nn"},  # they compare functions, and are in the wheel for users of those
    "kernels": set(RANK),
}
FILES = sorted((ROOT / "egnn_fast").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return "kernels"
    return relative.parts[1].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The package's parts that a file imports, wherever it does so."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module]
            if node.module == "egnn_fast":
                names = [f"egnn_fast.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("egnn_fast.")}
    return parts & set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":  # the package's names come from everywhere
        return
    others = imported(path) - {part}
    wrong = {other for other in others if RANK[other] >= RANK[part]}
    assert not wrong | (others & FORBIDDEN.get(part, set())), (part, sorted(others))


def test_every_part_has_a_floor() -> None:
    assert {part_of(path) for path in FILES} - {"__init__", "__pycache__"} == set(RANK)


def test_tests_mirror_the_package() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    parts = {part for part in RANK if (ROOT / "egnn_fast" / part).is_dir()} | {"kernels", "docs"}
    others = {"support", "data", "__pycache__"}
    assert folders - others == parts


def test_nothing_installed_imports_what_is_not() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert module is None or not module.startswith(("bench", "tests")), path
