"""Each hostile file ends in a typed error or a value, within 2 GB and 20 seconds; a scan for other readers."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import KILLS, SEED

ROOT = Path(__file__).parents[2]
SLOW = 8  # of the files that take seconds, `make test` tries one in so many
HEAVY = ("bomb", "dictionary", "wide_table", "many_values", "200_000", "100_megabytes", "many_columns", "million")


def test_hostile_files_end_in_typed_errors(tmp_path: Path) -> None:
    from tests.formats.hostile import CASES

    heavy = [name for name in CASES if any(word in name for word in HEAVY)]
    left_out = set() if KILLS >= 10 else set(heavy) - set(heavy[SEED % SLOW :: SLOW])
    names = [name for name in CASES if name not in left_out]
    command = [sys.executable, "-m", "tests.formats.hostile", str(tmp_path / "files"), *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(names) > 50
    assert [line for line in lines if line.split(" | ")[2][1:].split()[0] not in ("typed", "value")] == []


READS = {("pq", "read_table"), ("pq", "ParquetFile"), ("pq", "read_schema"), ("lzma", "open"), ("tomllib", "loads")}
NAMES = {"load_file", "safe_open", "GGUFReader", "load_tokenizer_from_file"}
# Readers of what this program has written itself, or of other programs of this machine.
OWN = {
    "flows/tracking/item_tables.py": "scores that `read_scored` has read",
    "vectorclm/bench/workers.py": "files that the measurement itself has written",
}


def readers(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of each call by which a text of Python reads a foreign format without its loader."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in NAMES:
            yield node.lineno, function.id
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            name = (function.value.id, function.attr)
            if name in READS or name[1] in NAMES or name == ("Tokenizer", "from_file"):
                yield node.lineno, ".".join(name)
            elif name == ("json", "loads") and any(
                isinstance(inner, ast.Attribute)
                and inner.attr in ("read_text", "read_bytes")
                and "folder" in ast.unparse(inner.value)
                for argument in node.args
                for inner in ast.walk(argument)
            ):
                yield node.lineno, "json.loads of a file in a folder"


def test_foreign_files_are_read_by_their_loaders_alone() -> None:
    found = []
    for path in sorted(path for folder in ("vectorclm", "flows") for path in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("vectorclm/formats/") and name not in OWN:
            found += [f"{name}:{line}: {what}" for line, what in readers(path.read_text(encoding="utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "pq.read_table(x)",
        "load_file(x)",
        "gguf.GGUFReader(x)",
        "Tokenizer.from_file(x)",
        "tomllib.loads(x)",
        "lzma.open(x)",
    ],
)
def test_other_readers_are_found(text: str) -> None:
    assert list(readers(text))
    assert not list(readers("parse_json(x)"))
