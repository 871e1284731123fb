"""Limits that keep the code readable: functions of a screen, short files, packages that say what they are for."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.module_coverage import modules, own_test

ROOT = Path(__file__).parents[1]
FUNCTION_LINES, FILE_LINES = 60, 400
CORE_PAGE = (ROOT / "vectorclm" / "README.md").read_text(encoding="utf-8")
FILES = sorted(path for folder in ("vectorclm", "flows", "tests", "docker") for path in (ROOT / folder).rglob("*.py"))


def too_long(path: Path) -> Iterator[str]:
    """What in a file is longer than the limits, a line each."""
    text = path.read_text(encoding="utf-8")
    if (lines := text.count("\n")) > FILE_LINES:
        yield f"{path}: {lines} lines, {FILE_LINES} at most: move its second idea to a module of its own"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES:
            yield f"{path}:{node.lineno}: {node.name} has {lines} lines, {FUNCTION_LINES} at most"


def test_functions_and_files_are_short() -> None:
    assert [line for path in FILES for line in too_long(path)] == []


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    file = tmp_path / "long.py"
    file.write_text("def f():\n" + "    x = 1\n" * FUNCTION_LINES)
    assert len(list(too_long(file))) == 1
    file.write_text("x = 1\n" * (FILE_LINES + 1))
    assert len(list(too_long(file))) == 1
    file.write_text("def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1))
    assert list(too_long(file)) == []


PACKAGES = [path.parent for path in FILES if path.name == "__init__.py" and "tests" not in path.relative_to(ROOT).parts]


@pytest.mark.parametrize("package", [str(path.relative_to(ROOT)) for path in PACKAGES])
def test_a_package_says_what_it_is_for(package: str) -> None:
    parsed = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(parsed), f"{package}/__init__.py has no docstring"


def test_each_module_of_the_flows_has_a_test_of_its_name() -> None:
    assert len(modules()) > 40
    assert [str(own_test(path).relative_to(ROOT)) for path in modules() if not own_test(path).is_file()] == []


def test_the_cores_page_lists_its_floors_in_the_order_of_the_imports() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (
        each["layers"] for each in project["tool"]["importlinter"]["contracts"] if each.get("exhaustive_ignores") == []
    )
    order = [name for layer in layers for name in layer.split(" | ")]
    rows = re.findall(r"^\| (`.*`) \| .* \|$", CORE_PAGE, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)(?:\.py|/)`", row)]
    assert [name for name in named if name != "experiments"] == order


def test_the_recipes_name_files_and_names_that_exist() -> None:
    files = re.findall(r"`([\w/]+\.(?:py|toml))`", CORE_PAGE)
    assert len(files) > 30
    assert [name for name in files if not (ROOT / name).exists() and not (ROOT / "vectorclm" / name).exists()] == []
    sources = "".join(path.read_text(encoding="utf-8") for path in FILES)
    names = set(re.findall(r"`(?:\w+\.)?([A-Za-z_]\w+)`", CORE_PAGE)) - {"make"}
    assert len(names) > 20 and [name for name in names if not re.search(rf"\b{name}\b", sources)] == []


def positional_defaults(text: str) -> list[int]:
    """The lines of a module on which `Field` gets its default without the keyword."""
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and node.args)
    return [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "Field"]


def test_type_checkers_see_the_default_of_every_setting() -> None:
    """They take it from the keyword alone (PEP 681), and else ask for every argument of `Runtime(threads=1)`."""
    assert positional_defaults("a: int = Field(default=0)\nb: int = Field(0, ge=0)") == [2]
    core = [path for path in FILES if path.relative_to(ROOT).parts[0] == "vectorclm"]
    assert {str(path): lines for path in core if (lines := positional_defaults(path.read_text()))} == {}
