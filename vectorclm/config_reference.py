"""Reference of the configuration keys: Markdown tables, generated from the config classes.

`python -m vectorclm.config_reference` writes the tables into `experiments/README.md`. A test fails where the page is
older than the classes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vectorclm.config import EXPERIMENTS, ExperimentConfig, Suite
from vectorclm.runtime.devices import Runtime
from vectorclm.settings import Settings

PAGE = EXPERIMENTS / "README.md"
BEGIN, END = "<!-- generated: python -m vectorclm.config_reference -->\n", "<!-- end of the generated part -->"
HEAD = "| key | type | default | bounds | unit | meaning |\n|---|---|---|---|---|---|\n"
NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}
COMPARISONS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "multiple of"}
UNITS = {
    **dict.fromkeys(("bytes", "shard_bytes", "min_bytes", "max_bytes"), "bytes"),
    **dict.fromkeys(("tokens", "vocab_size", "sequence_length", "max_position_embeddings", "max_new_tokens"), "tokens"),
    **dict.fromkeys(("batch_size", "validation_windows", "micro_batch_size"), "windows"),
    **dict.fromkeys(("validation_interval", "interval", "checkpoint_interval"), "steps"),
    **dict.fromkeys(("conversations", "shuffle_buffer", "chat_prompts"), "conversations"),
    **dict.fromkeys(("validation_share", "replay"), "share"),
    **dict.fromkeys(("warmup", "decay"), "share of the steps"),
    **dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), "dimensions"),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), "heads"),
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), "probability"),
    "documents": "documents",
    "epochs": "passes",
    "floor": "share of the peak",
    "instructions": "prompts",
    "limit": "items",
    "loader_workers": "processes",
    "names": "names",
    "num_hidden_layers": "layers",
    "processes": "processes",
    "retries": "attempts",
    "shots": "examples",
    "threads": "threads",
}


def reference() -> str:
    """All keys as Markdown: those of an experiment, of a suite, and of the machine."""
    experiment, suite, machine = _classes(ExperimentConfig), _classes(Suite), _classes(Runtime)
    own = {cls: places for cls, places in suite.items() if cls not in experiment}
    parts = [
        "## Keys of an experiment\n\nEach table names the sections of the file in which its keys stand.\n",
        *_tables(experiment),
        "## Keys of a suite\n\nA suite also has the keys of `[evaluate]`, all of them optional, and "
        "`[[tasks]]` with the keys of `[[evaluate.tasks]]`.\n",
        *_tables(own),
        "## Keys of the machine\n\nThese keys stand in the file of `--runtime`, such as `machine.toml` with the lines "
        '`device = "cuda"` and `micro_batch_size = 8`; `vectorclm run` takes each as an option, too. None enters a '
        "fingerprint.\n",
        *_tables(machine),
    ]
    return "\n".join(parts)


def updated(page: str) -> str:
    """The page's text with the present tables. Raises ValueError where the page lacks the two marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE} lacks the line {BEGIN.strip()} or {END}")
    return f"{before}{begin}\n{reference()}\n{end}{after}"


def _classes(root: type[Settings]) -> dict[type[Settings], list[str]]:
    """The classes of a file with their sections, in the order of the file."""
    found: dict[type[Settings], list[str]] = {}
    _collect(root, "", found)
    return found


def _collect(cls: type[Settings], place: str, found: dict[type[Settings], list[str]]) -> None:
    """Add the classes that declare the keys at `place`, and those of all tables below."""
    for declaring in reversed(cls.__mro__):
        if issubclass(declaring, Settings) and declaring is not Settings and _own_fields(declaring):
            places = found.setdefault(declaring, [])
            places += [place] if place not in places else []
    for name, field in cls.model_fields.items():
        inner, many = _table_in(field.annotation)
        if inner is not None and inner is not ExperimentConfig:
            key = f"{place.strip('[]')}.{name}".strip(".")
            _collect(inner, f"[[{key}]]" if many else f"[{key}]", found)


def _own_fields(cls: type[Settings]) -> dict[str, FieldInfo]:
    return {name: field for name, field in cls.model_fields.items() if name in cls.__annotations__}


def _table_in(annotation: Any) -> tuple[type[Settings] | None, bool]:
    """The settings class in an annotation, and whether the file has a list of such tables."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation, False
    for part in get_args(annotation):
        inner, many = _table_in(part)
        if inner is not None:
            return inner, many or get_origin(annotation) is list
    return None, False


def _tables(classes: dict[type[Settings], list[str]]) -> Iterator[str]:
    """A table for each set of places; a key that a class declares again stands once, as the class has it."""
    tables: dict[str, tuple[type[Settings], dict[str, FieldInfo]]] = {}
    for cls, places in classes.items():
        where = ", ".join(f"`{place}`" for place in places if place) or "At the top of the file"
        _, above = tables.get(where, (cls, {}))
        tables[where] = cls, {**above, **_own_fields(cls)}
    for where, (cls, fields) in tables.items():
        about = (cls.__doc__ or "").strip().splitlines()[0]
        rows = "".join(_row(name, field) for name, field in fields.items())
        yield f"### {where}\n\n{about}\n\n{HEAD}{rows}"


def _row(name: str, field: FieldInfo) -> str:
    inner, many = _table_in(field.annotation)
    meaning = field.description or ((inner.__doc__ or "").strip().splitlines()[0].rstrip(".") if inner else "")
    kind = _kind(field.annotation) if inner is None else "list of tables" if many else "table"
    unit = UNITS.get(name, "") if inner is None else ""
    cells = [f"`{name}`", kind, _default(field), _bounds(field), unit, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _kind(annotation: Any) -> str:
    if annotation in NAMES:
        return NAMES[annotation]
    origin, parts = get_origin(annotation), [part for part in get_args(annotation) if part is not NoneType]
    if origin is Literal:
        return " or ".join(f"`{json.dumps(part)}`" for part in parts)
    if origin is list:
        return f"list of {_kind(parts[0])}s"
    if origin is dict:
        return f"table of {_kind(get_args(parts[1])[0] if get_args(parts[1]) else parts[1])}s by name"
    return " or ".join(_kind(part) for part in parts)


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if isinstance(value, Settings):
        return "defaults of the table"
    return f"`{value:,}`".replace(",", "_") if isinstance(value, int) and value > 9999 else f"`{json.dumps(value)}`"


def _bounds(field: FieldInfo) -> str:
    found = []
    for item in field.metadata:
        found += [f"{sign} {getattr(item, name):,}" for name, sign in COMPARISONS.items() if hasattr(item, name)]
        if (least := getattr(item, "min_length", None)) is not None:
            found.append(f"at least {least} entry")
        if (pattern := getattr(item, "pattern", None)) is not None:
            found.append(f"`{pattern}`")
    return ", ".join(found)


def main(page: Path = PAGE) -> None:
    """Write the present tables into the page."""
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
