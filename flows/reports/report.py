"""`vectorclm report`: a curriculum as one HTML page without network or scripts.

The page is built from the artifacts of a store, and from the scores over time that MLflow has. Text of models and
documents is untrusted: the template escapes all of it.
"""

import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from flows.reports.lineage_graph import draw_lineage
from flows.reports.plots import COLOURS, IntervalBar, bars, curves, intervals, short
from flows.reports.score_history import history_chart
from flows.tracking.client import flatten
from flows.tracking.lookup import opened, score_histories
from vectorclm.comparison.compare import followed, has_items
from vectorclm.comparison.curves import curves_of
from vectorclm.corpus.summary import drop_counts
from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation.instruction_checks import FOLLOWED
from vectorclm.evaluation.statistics import Change, wilson_interval
from vectorclm.formats.json_files import table_lines
from vectorclm.lineage.chain import Lineage, Node, facts, lineage
from vectorclm.model_config import ModelConfig
from vectorclm.settings import validate
from vectorclm.stage_builders import tokens_by_source
from vectorclm.stages import BY_NAME, EXPORTED, READS
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.durable import write_file
from vectorclm.store.layout import MEASURE
from vectorclm.store.listing import take_inventory

if TYPE_CHECKING:  # MLflow takes seconds to import
    from flows.tracking.registry import Result

logger = logging.getLogger(__name__)

ANSWERS = 12  # number of sample answers shown
TIMES = 5  # number of steps of a training whose samples are shown
KINDS = {"acc": "accuracy", "bits_per_byte": "bits per byte", "in_template": "answers that end"}  # of scores


class Measured(NamedTuple):
    """A model on the page: its name and its evaluation."""

    who: str
    artifact: Artifact

    @property
    def scores(self) -> Mapping[str, Any]:
        """The content of `scores.json`."""
        return self.artifact.summary


def report(
    found: Lineage,
    store: Store,
    champion: Lineage | None = None,
    name: str = "",
    histories: "Mapping[str, Sequence[Result]] | None" = None,
) -> str:
    """The report of a model as an HTML page; `champion` is a model to compare with, `name` the experiment.

    `histories` are scores over time of the registered model, by their titles.
    """
    models = _models(found, store, champion)
    page = {
        "name": name,
        "root": found.root,
        "made": found.root.artifact,
        "headline": _headline(found, models),
        "trainings": [_training(node) for node in found.stages.values() if node.stage in READS and node.artifact],
        "mix": _mix(found),
        "sources": _sources(found),
        "models": models,
        "texts": list(dict.fromkeys(label for model in models for label in model.scores.get("bits_per_byte", {}))),
        "tasks": _tasks(models),
        "picture": _picture(models),
        "instructions": _instructions(models),
        "histories": {title: history_chart(title, results) for title, results in (histories or {}).items()},
        "samples": [(model.who, model.scores["samples"][:ANSWERS]) for model in models if model.scores.get("samples")],
        "graph": draw_lineage(found),
        "costs": _costs(found),
        "settings": _settings(found),
        "nodes": [node for node in found.nodes.values() if node.artifact is not None],
        "colours": range(COLOURS),
        "facts": facts,
        "followed": FOLLOWED,
    }
    environment = Environment(
        loader=PackageLoader("flows.reports", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(short=short, duration=lambda seconds: str(timedelta(seconds=round(seconds))))
    return environment.get_template("report.html.jinja").render(page)


def _models(found: Lineage, store: Store, champion: Lineage | None) -> list[Measured]:
    """The evaluated models: the base model, the model of the page, and the champion."""
    base = found.stages.get(EXPORTED["base"])
    sides = []
    if base is not None and base is not found.root and base.artifact is not None:
        sides.append((base.title, lineage(base.artifact.uri, store)))
    sides.append((found.root.title, found))
    if champion is not None and champion.root.fingerprint != found.root.fingerprint:
        sides.append(("champion", champion))
    return [Measured(who, own) for who, side in sides if (own := _own_scores(side)) is not None]


def _own_scores(found: Lineage) -> Artifact | None:
    """The evaluation that the curriculum itself ran."""
    return next((item for item in found.scores if item.stage != MEASURE), None)


def _headline(found: Lineage, models: Sequence[Measured]) -> list[tuple[str, str]]:
    """The most important figures, as label and text."""
    cards = []
    base = found.stages.get(EXPORTED["base"])
    if base is not None and base.artifact is not None:
        summary = base.artifact.summary
        cards += [("parameters", short(summary["parameters"])), ("tokens of pretraining", short(summary["tokens"]))]
        cards.append(("last loss", f"{summary['last_loss']:.3f}"))
    for model in models:
        if bits := model.scores.get("bits_per_byte"):
            cards.append((f"bits per byte, {model.who}", f"{sum(bits.values()) / len(bits):.3f}"))
    return cards


def lines_of(artifact: Artifact, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a training's `metrics.jsonl` or `samples.jsonl`; empty if it has none."""
    if name not in artifact.manifest["files"]:
        return []
    return list(table_lines(artifact.store.read(artifact.key(name)) or b"", artifact.store.uri_of(artifact.key(name))))


def _training(node: Node) -> dict[str, Any]:
    """The curves, events and samples of one training, over its tokens."""
    assert node.artifact is not None
    lines, config = lines_of(node.artifact), node.artifact.manifest["config"]
    steps = [line for line in lines if "loss" in line]
    held_out: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for label, figures in line.get("validation", {}).items():
            held_out.setdefault(label, []).append((line["tokens"], figures["bits_per_byte"]))
    marks, begun = {}, 0
    for number, phase in enumerate(config.get("phases", []), 1):
        if begun:
            marks[f"phase {number}"] = float(begun)
        begun += phase["tokens"]

    def curve(key: str) -> dict[str, list[tuple[float, float]]]:
        return {key: [(line["tokens"], line[key]) for line in steps]}

    return {
        "title": BY_NAME[node.stage].title,
        "summary": node.artifact.summary,
        "samples": samples_over_time(lines_of(node.artifact, "samples.jsonl")),
        "events": [line for line in lines if "event" in line],
        "charts": [
            ("Loss, nats a token", [], curves("loss", curve("loss"), marks=marks)),
            ("Held-out text, bits per byte", list(held_out), curves("bits per byte", held_out, marks=marks)),
            ("Learning rate", [], curves("learning rate", curve("learning_rate"), marks=marks)),
            ("Gradient norm", [], curves("gradient norm", curve("grad_norm"), marks=marks)),
            ("Tokens a second", [], curves("tokens a second", curve("tokens_per_second"), marks=marks)),
            *_checkpoints(node.artifact),
        ],
    }


def _checkpoints(training: Artifact) -> list[tuple[str, list[str], Any]]:
    """The scores of a training's checkpoints, one chart for each suite and kind of score."""
    charts = []
    for suite, scores in curves_of(training).items():
        kinds: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for score, points in scores.items():
            kind, _, label = score.partition(".")
            kinds.setdefault(kind, {})[label or kind] = [(float(step), value) for step, value in points]
        for kind, lines in kinds.items():
            title = f"Checkpoints on {suite}, {KINDS.get(kind, kind.replace('_', ' '))}"
            charts.append((title, list(lines), curves(title, lines, "steps")))
    return charts


def samples_over_time(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, str]]]:
    """The answers to each prompt after TIMES steps at even distances, the first and the last included."""
    places = [round(number * (len(lines) - 1) / (TIMES - 1)) for number in range(TIMES)] if lines else []
    found: dict[str, list[tuple[int, str]]] = {}
    for place in dict.fromkeys(places):
        for sample in lines[place]["samples"]:
            found.setdefault(sample["prompt"], []).append((lines[place]["step"], sample["answer"]))
    return found


def _settings(found: Lineage) -> list[tuple[Node, dict[str, str]]]:
    """The settings of each stage, as recorded in its manifest, by their dotted keys."""
    nodes = [(node, node.artifact.manifest["config"]) for node in found.stages.values() if node.artifact is not None]
    return [(node, rows) for node, config in nodes if (rows := flatten(config))]


def _mix(found: Lineage) -> list[tuple[str, Any]]:
    """The training data by source, as bar charts."""
    mixes = []
    base, shards, chat = (found.stages.get(stage) for stage in (EXPORTED["base"], "shards", "chat_shards"))
    if base is not None and shards is not None and base.artifact is not None and shards.artifact is not None:
        there = tokens_by_source(shards.artifact.summary)
        epochs = base.artifact.summary["epochs"]
        read = {label: epochs.get(label, 0.0) * tokens for label, tokens in there.items()}
        labels = {
            label: f"{short(tokens)} tokens, {epochs.get(label, 0.0):.2f} epochs" for label, tokens in read.items()
        }
        mixes.append(("Pretraining text", bars("data mix", read, labels)))
    if chat is not None and chat.artifact is not None:
        counts = {label: float(split.get("train", 0)) for label, split in chat.artifact.summary["sources"].items()}
        labels = {label: f"{count:,.0f} conversations" for label, count in counts.items()}
        mixes.append(("Conversations", bars("conversations", counts, labels)))
    return mixes


def _sources(found: Lineage) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of the sources: how much was read, kept for training and validation, and dropped."""
    tables = []
    sample, shards, chat = (
        node.artifact.summary if (node := found.stages.get(stage)) is not None and node.artifact is not None else None
        for stage in ("sample", "shards", "chat_shards")
    )
    if sample is not None and shards is not None:
        rows = []
        for label, source in sample["sources"].items():
            train, validation = (shards[label].get(split, {}).get("tokens", 0) for split in ("train", "validation"))
            counts = [source["read"], source["documents"], train, source["validation_documents"], validation]
            lost = drop_counts(source["dropped"], source["contaminated"])
            rows.append([label, *(f"{count:,}" for count in counts), lost])
        tables.append(("documents", ["read", "training", "tokens", "validation", "tokens", "dropped"], rows))
    if chat is not None:
        rows = [
            [
                label,
                *(f"{source[key]:,}" for key in ("read", "train", "validation", "shortened")),
                drop_counts(source["dropped"], source["contaminated"]),
            ]
            for label, source in chat["sources"].items()
        ]
        tables.append(("conversations", ["read", "training", "validation", "shortened", "dropped"], rows))
    return tables


def _tasks(models: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """For each benchmark: chance, the score of counting words, items, each model's score with its interval."""
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        for label, task in model.scores["tasks"].items():
            known = {key: task.get(key) for key in ("chance", "counting", "items")}
            row = found.setdefault(label, {**known, "scores": {}})
            low, high = wilson_interval(task["acc"], task["items"])
            row["scores"][model.who] = IntervalBar(model.who, task["acc"], low, high)
    return found


def _instructions(models: Sequence[Measured]) -> list[tuple[str, str, list[Change]]]:
    """Instruction following of the first model against each other model: the two names and the changes."""
    if not models or not has_items(models[0].artifact):
        return []
    pairs = [(models[0], model) for model in models[1:] if has_items(model.artifact)]
    found = []
    for before, after in pairs:
        try:
            if changes := followed(before.artifact, after.artifact):
                found.append((before.who, after.who, changes))
        except DataError as error:  # a champion may have other prompts
            logger.info("%s and %s are not compared: %s", before.who, after.who, error)
    return found


def _picture(models: Sequence[Measured]) -> Any:
    rows = {label: (row["chance"], list(row["scores"].values())) for label, row in _tasks(models).items()}
    return intervals("benchmarks", rows) if rows else ""


def _costs(found: Lineage) -> list[dict[str, Any]]:
    """The costs of each training: seconds from its own speed, devices, FLOPs."""
    costs = []
    base = found.stages.get(EXPORTED["base"])
    if base is None or base.artifact is None:
        return []
    model = validate(ModelConfig, base.artifact.manifest["config"]["model"], base.artifact.uri)
    for stage, data in READS.items():
        node, shards = found.stages.get(stage), found.stages.get(data)
        if node is None or node.artifact is None or shards is None or shards.artifact is None:
            continue
        summary, environment = node.artifact.summary, node.artifact.manifest["environment"]
        steps = [line for line in lines_of(node.artifact) if "loss" in line]
        before = [0, *(line["tokens"] for line in steps[:-1])]
        seconds = sum(
            (line["tokens"] - done) / line["tokens_per_second"] for done, line in zip(before, steps, strict=True)
        )
        flops = model.flops_per_token(shards.artifact.manifest["config"]["sequence_length"]) * summary["tokens"]
        devices = environment["world_size"]
        costs.append(
            {
                "stage": BY_NAME[stage].title,
                "device": environment["device"],
                "devices": devices,
                "seconds": seconds,
                "device_hours": seconds * devices / 3600,
                "flops": flops,
                "rate": flops / seconds / devices if seconds else 0.0,
            }
        )
    return costs


def write_report(model: str, store: Store, against: str | None, out: Path) -> None:
    """Write the report of a model to the file `out`. Raises ConfigError where the file cannot be written."""
    other = opened(against, store) if against is not None else None
    found = opened(model, store)
    users = take_inventory(store).used_by().get(found.root.fingerprint, set())
    name = next(iter(users)) if len(users) == 1 else ""
    page = report(found, store, other, name, score_histories(found.root.fingerprint, store))
    try:
        write_file(out, page.encode())
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): name another file with --out") from error
    print(out)
