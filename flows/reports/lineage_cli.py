"""`vectorclm lineage`: print the lineage of a model as a tree or as JSON, with links to its runs in MLflow.

Links need an MLflow server, or a database of MLflow beside the store; all else is read from the store.
"""

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.tree import Tree

from flows.tracking.lookup import opened, recorded, versions
from vectorclm.command_line import FILE_WIDTH
from vectorclm.errors import ConfigError, VectorCLMError
from vectorclm.lineage.chain import (
    SHORT,
    Change,
    Lineage,
    Node,
    as_object,
    changes,
    describe_node,
    models_that_read,
    score_facts,
    verify,
)
from vectorclm.stages import BY_NAME
from vectorclm.store.artifact import Store

if TYPE_CHECKING:  # MLflow takes seconds to import
    from flows.tracking.recorded_lineage import Record


def run(address: str, store: Store, console: Console, *, check: bool, as_json: bool) -> int:
    """Print a lineage; with `check`, hash all files. Returns 1 if something differs."""
    found = opened(address, store)
    record, why = recorded(found, store)
    differences = list(_differences(found, record)) if check else []
    if as_json:
        fields = as_object(found)
        if record is not None:
            fields["mlflow"] = {"runs": dict(record.runs), "versions": dict(record.versions)}
        if check:
            fields["differences"] = differences
        print(json.dumps(fields, ensure_ascii=False))
        return 1 if differences else 0
    show(found, record, console)
    if record is None:
        console.print(why, style="dim", highlight=False, markup=False, soft_wrap=True)
    for difference in differences:
        console.print(difference, style="red", highlight=False, markup=False, soft_wrap=True)
    if check and not differences:
        console.print("verified: every file and fingerprint is what its manifest says", style="green")
    return 1 if differences else 0


def _differences(found: Lineage, record: "Record | None") -> Iterator[str]:
    yield from verify(found)
    if record is not None and record.names is not None and record.names != found.root.names:
        yield f"MLflow has recorded another lineage of this model: {json.dumps(record.names)}"


def show(found: Lineage, record: "Record | None", console: Console) -> None:
    """Print a lineage as a tree; an artifact with several users is printed once."""
    if found.copy is not None or found.folder is not None:
        copy = found.folder or (found.copy and found.copy.uri)
        console.print(f"{copy} is a copy of", highlight=False, markup=False, soft_wrap=True)
    printed: set[str] = set()
    tree = Tree(_line(found.root, record), guide_style="dim")
    _grow(tree, found.root, record, printed)
    for item in found.scores:
        suite = item.manifest["config"].get("suite", "its own suite")
        figures = "  ".join(f"{key} {value:.4f}" for key, value in score_facts(item).items())
        place = f"{item.stage}/{item.fingerprint[:SHORT]}"
        tree.add(f"[bold]scores[/] on {escape(str(suite))}  {escape(figures)}  [dim]{place}[/]")
    console.print(tree, highlight=False)


def _grow(tree: Tree, node: Node, record: "Record | None", printed: set[str]) -> None:
    printed.add(node.fingerprint)
    for source in node.sources:
        where = f" ({source.path})" if source.path else ""
        tree.add(f"source [bold]{escape(source.label)}[/]{escape(where)} at {escape(source.revision)}")
    for part in sorted(node.inputs, key=lambda part: len(part.inputs)):
        if part.fingerprint in printed:
            tree.add(f"{part.title} [cyan]{part.fingerprint[:SHORT]}[/] [dim](above)[/]")
        else:
            _grow(tree.add(_line(part, record)), part, record, printed)


def _line(node: Node, record: "Record | None") -> str:
    """The lines of an artifact in the tree."""
    head = f"[bold]{node.title}[/] [cyan]{node.fingerprint[:SHORT]}[/]"
    if node.artifact is None:
        return f"{head} [red]gone from the store[/]"
    manifest = node.artifact.manifest
    git = str(manifest["environment"].get("git"))
    revision = git[:SHORT] + (" with uncommitted changes" if git.endswith("-dirty") else "")
    lines = [
        f"{head}  {escape(describe_node(node))}",
        f"[dim]{escape(manifest['created'])}, code {escape(revision)}[/]",
    ]
    if record is not None:
        versions = ", ".join(record.versions.get(node.fingerprint, ()))
        page = record.runs.get(node.fingerprint, "")
        lines += [f"[green]{escape(versions)}[/]"] if versions else []
        lines += [f"[dim]{escape(page)}[/]"] if page else []
    return "\n".join(lines)


def print_differences(before: str, after: str, store: Store, console: Console, *, as_json: bool) -> int:
    """Print the differences between two models."""
    found = changes(opened(before, store), opened(after, store))
    if as_json:
        print(json.dumps([change._asdict() for change in found], ensure_ascii=False))
        return 0
    for change in found:
        console.print(_change(change), highlight=False, soft_wrap=True)
    if not found:
        console.print("the same artifacts, settings and scores")
    return 0


def _change(change: Change) -> str:
    sides = [escape(str(value)[:64]) if value is not None else "-" for value in change[1:]]
    return f"[bold]{escape(change.place)}[/]  {sides[0]} [dim]→[/] {sides[1]}"


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=FILE_WIDTH)


def print_lineage(model: str, store: Store, *, verify: bool, diff: str | None, as_json: bool) -> int:
    """Print the lineage of a model, or its differences from the model `diff`; returns 1 if a byte differs."""
    console = _console()
    if diff is not None:
        if verify:
            raise VectorCLMError("--diff and --verify exclude each other: give one of them")
        return print_differences(diff, model, store, console, as_json=as_json)
    return run(model, store, console, check=verify, as_json=as_json)


def print_users(source: str, model: str | None, store: Store, *, as_json: bool) -> int:
    """Print the models of a store that were trained on a source, oldest first, with their registered versions.

    Raises ConfigError where a model is named as well.
    """
    if model is not None:
        raise ConfigError("name a model, or a source by --uses, not both")
    found = models_that_read(source, store)
    registered, why = versions(dict.fromkeys(user.fingerprint for user, _ in found), store)
    if as_json:
        fields = [
            {"model": user.uri, **read._asdict(), "versions": registered.get(user.fingerprint, [])}
            for user, read in found
        ]
        print(json.dumps(fields, ensure_ascii=False))
        return 0
    table = Table("model", "", "source", "revision", "registered", box=None, pad_edge=False)
    for user, read in found:
        names = ", ".join(registered.get(user.fingerprint, ())) or "-"
        address = f"{user.stage}/{user.fingerprint[:SHORT]}"
        label = f"{read.label} ({read.path})" if read.path else read.label
        table.add_row(address, BY_NAME[user.stage].result, escape(label), escape(read.revision), escape(names))
    console = _console()
    console.print(table, highlight=False)
    if why:
        console.print(why, style="dim", highlight=False, markup=False, soft_wrap=True)
    return 0
