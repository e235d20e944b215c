"""The house: arrows between packages go one way, as CONTRIBUTING draws them; files and functions stay small."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "longred_megatron"
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
PYTHON = FILES + sorted((ROOT / "tools").rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 350, 60


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ({name if name in MODULES else str(node.module) for name in inner})
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(PACKAGE))


def rooms() -> list[list[str]]:
    """CONTRIBUTING's drawing: what stands further left may import what stands further right."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    [drawing] = re.findall(r"```\n(train ->.*?)```", text, re.DOTALL)
    return [[name.strip() for name in group.split(",")] for group in drawing.replace("\n", " ").split("->")]


def room_of(module: str) -> str:
    return module.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


def test_the_drawing_has_every_room_once() -> None:
    drawn = [name for group in rooms() for name in group]
    assert sorted(drawn) == sorted({room_of(module) for module in MODULES if module != PACKAGE})


@pytest.mark.parametrize("module", sorted(set(MODULES) - {PACKAGE}))
def test_arrows_go_to_the_right(module: str) -> None:
    places = {name: i for i, group in enumerate(rooms()) for name in group}
    own = room_of(module)
    for imported in imports(MODULES[module]):
        other = room_of(imported)
        if other and other != own:
            assert places[own] < places[other], f"{module} imports {imported}"


def test_no_circle_of_modules() -> None:
    graph = {module: {i for i in imports(file) if i != module} for module, file in MODULES.items()}
    # A package's own __init__ runs before its modules: it is the package that they make.
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_and_functions_stay_small(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno and node.end_lineno - node.lineno < MOST_FUNCTION_LINES, node.name
