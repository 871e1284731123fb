"""The summary of a finished curriculum: tables for a person, one JSON object for a program."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from flows.handle import Handle, duration
from flows.net import without_password
from flows.paths import local_folder
from flows.tracking.client import EXPERIMENTS_PAGE, tracking_uri
from flows.tracking.database import artifacts_destination
from vectorclm.comparison.compare import followed
from vectorclm.config import ExperimentConfig
from vectorclm.evaluation.instruction_checks import FOLLOWED
from vectorclm.evaluation.statistics import Change
from vectorclm.stages import BY_NAME, EVALUATED, MODELS, READS
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.layout import EXPORT

ANSWERS = 3  # number of sample answers shown
SCORED = {MODELS[training]: stage for stage, training in EVALUATED.items()}  # kind of a model -> its evaluation
TITLES = {MODELS[training]: BY_NAME[training].result for training in EVALUATED.values()}


class Summary:
    """The results of one curriculum, read from its artifacts' manifests."""

    def __init__(self, experiment: ExperimentConfig, store: Store, handles: Mapping[str, Handle]) -> None:
        self.experiment, self.store, self.handles = experiment, store, handles
        judged = {kind: self._of(stage) for kind, stage in SCORED.items() if stage in handles}
        self.titles = {kind: TITLES[kind] for kind in judged}  # of the models, the last one last
        self.last = list(judged)[-1]
        self.scores = {kind: artifact.summary for kind, artifact in judged.items()}
        self.followed = followed(judged["base"], judged["chat"]) if "chat" in judged else []
        export = self._of(EXPORT)
        folder = export.local() if not store.is_local else None
        self.models = {kind: str(folder / kind if folder is not None else f"{export.uri}/{kind}") for kind in judged}

    def _of(self, stage: str) -> Artifact:
        found = self.store.find(stage, self.handles[stage]["fingerprint"])
        assert found is not None
        return found

    def as_object(self) -> dict[str, Any]:
        """The object that `--json` prints; `scores` has the base model's means, and all scores of both models."""
        keys = ("fingerprint", "uri", "state", "seconds")
        stages = {name: {key: dict(handle)[key] for key in keys} for name, handle in self.handles.items()}
        tasks = [task["acc"] for task in self.scores["base"]["tasks"].values()]
        scores = {
            "multiple_choice": fmean(tasks) if tasks else None,
            "bits_per_byte": fmean(self.scores["base"]["bits_per_byte"].values()),
            **self.scores,
            "followed": {
                change.name: {"difference": change.difference, "low": pair.low, "high": pair.high}
                for change in self.followed
                if (pair := change.paired) is not None
            },
        }
        return {"stages": stages, "scores": scores, "models": self.models}

    def as_markdown(self) -> str:
        """The results as Markdown for the Prefect UI: scores, held-out text, answers, model folders."""
        heads, rules = " | ".join(self.titles.values()), "---:|" * len(self.titles)
        lines = [f"| multiple choice | chance | {heads} |", f"|---|---:|{rules}"]
        for label, task in self.scores["base"]["tasks"].items():
            found = " | ".join(f"{self.scores[kind]['tasks'][label]['acc']:.1%}" for kind in self.titles)
            lines.append(f"| {label} | {task['chance']:.1%} | {found} |")
        if self.followed:
            lines += [
                "",
                f"| instructions followed | {TITLES['base']} | {TITLES['chat']} | difference, 95 % |",
                "|---|---:|---:|---:|",
            ]
        for change in self.followed:
            base, chat = f"{change.before.value:.1%}", f"{change.after.value:.1%}"
            lines.append(f"| {FOLLOWED[change.name]} | {base} | {chat} | {_margin(change)} |")
        lines += ["", f"| held-out text, bits per byte | {heads} |", f"|---|{rules}"]
        for label in self.scores["base"]["bits_per_byte"]:
            found = " | ".join(f"{self.scores[kind]['bits_per_byte'][label]:.4f}" for kind in self.titles)
            lines.append(f"| {label} | {found} |")
        for sample in self.scores[self.last]["samples"][:ANSWERS]:
            answer = sample["answer"].strip() or "(nothing)"
            lines += ["", f"**{sample['prompt']}**", "", *(f"    {line}" for line in answer.splitlines())]
        lines += ["", *(f"- {TITLES[kind]}: `{place}`" for kind, place in self.models.items())]
        return "\n".join(lines)

    def show(self, console: Console) -> None:
        """Print the results as tables."""
        console.print()
        body = Group(
            self._stages(), self._training(), self._texts(), self._tasks(), *self._instructions(), self._answers()
        )
        title = f"[bold]{self.experiment.name}[/]"
        console.print(Panel(body, title=title, box=box.ROUNDED, padding=(0, 2)))
        for (
            heading,
            place,
        ) in self._places():  # outside of the frame and never wrapped, so that they can be copied
            console.print(f"[dim]{heading:<11}[/] {escape(place)}", soft_wrap=True, highlight=False)

    def _stages(self) -> RenderableType:
        table = _table("stage", "state", "time >", "fingerprint")
        for name, handle in self.handles.items():
            built = handle["state"] == "built"
            state = "[green]built[/]" if built else "[cyan]reused[/]"
            table.add_row(name, state, duration(handle["seconds"]) if built else "", handle["fingerprint"][:12])
        return table

    def _training(self) -> RenderableType:
        table = _table("training", "steps >", "tokens >", "first >", "last loss >", "held-out >", "tokens/s >")
        for stage in (name for name in READS if name in self.handles):
            summary = self._of(stage).summary
            held_out = fmean(item["loss"] for item in summary["validation"].values())
            table.add_row(
                stage,
                f"{summary['steps']:,}",
                f"{summary['tokens']:,}",
                f"{summary['first_loss']:.3f}",
                f"[bold]{summary['last_loss']:.3f}[/]",
                f"{held_out:.3f}",
                f"{summary['tokens_per_second']:,.0f}",
            )
        return table

    def _texts(self) -> RenderableType:
        table = _table("held-out text, bits per byte", *(f"{title} >" for title in self.titles.values()))
        for label in self.scores["base"]["bits_per_byte"]:
            table.add_row(label, *(f"{self.scores[kind]['bits_per_byte'][label]:.4f}" for kind in self.titles))
        return table

    def _tasks(self) -> RenderableType:
        table = _table("multiple choice", "chance >", *(f"{title} >" for title in self.titles.values()), "items >")
        for label, task in self.scores["base"]["tasks"].items():
            found = [self.scores[kind]["tasks"][label] for kind in self.titles]
            figures = [f"[bold]{item['acc']:.1%}[/] ± {item['stderr']:.1%}" for item in found]
            table.add_row(label, f"{task['chance']:.1%}", *figures, f"{task['items']:,}")
        counts = self.scores[self.last].get("chat")
        if counts:
            share = f"{counts['answered_in_template']} of {counts['prompts']}"
            table.add_row("ends its answers", "", "", f"[bold]{share}[/]", "")
        return table

    def _instructions(self) -> list[RenderableType]:
        names = [f"{title} >" for title in self.titles.values()]
        table = _table("instructions followed", *names, "difference, 95 % >")
        for change in self.followed:
            figures = [f"[bold]{item.value:.1%}[/] ± {item.stderr:.1%}" for item in (change.before, change.after)]
            table.add_row(FOLLOWED[change.name], *figures, _margin(change))
        counts = self.scores[self.last].get("instructions", {})
        if counts:
            table.add_row("ends its answers", "", f"[bold]{counts['ended']} of {counts['prompts']}[/]", "")
        return [table] if self.followed else []

    def _answers(self) -> RenderableType:
        lines = []
        for sample in self.scores[self.last]["samples"][:ANSWERS]:
            lines.append(f"[bold]you[/]    {escape(sample['prompt'])}")
            lines.append(f"[bold green]model[/]  {escape(sample['answer'].strip()) or '[dim](nothing)[/]'}")
        return Text.from_markup("\n".join(lines))

    def _places(self) -> list[tuple[str, str]]:
        uri, page = tracking_uri(self.store), f"/{EXPERIMENTS_PAGE}"
        if uri.startswith("sqlite:"):
            files = ["--artifacts-destination", artifacts_destination(self.store, local_folder(self.store))]
            look = [("MLflow", command("mlflow", "ui", "--backend-store-uri", uri, *files, "--port", "5000"))]
            look += [("", f"http://localhost:5000{page}")]
        else:
            place = without_password(uri).rstrip("/")
            look = [("MLflow", place + page if place.startswith("http") else place)]
        return [
            *look,
            ("artifacts", self.store.uri),
            *((TITLES[kind], place) for kind, place in self.models.items()),
            *([("talk to it", command("vectorclm", "chat", self.models["chat"]))] if "chat" in self.models else []),
        ]


def _margin(change: Change) -> str:
    """The difference between the models in percentage points, its 95 % interval and the verdict."""
    assert change.paired is not None
    points = [f"{100 * value:+.1f}" for value in (change.difference, change.paired.low, change.paired.high)]
    return f"{points[0]} ({points[1]} to {points[2]}), {change.verdict}"


def command(program: str, *arguments: str) -> str:
    """A command line for a shell; with the program's folder if it is not on the PATH."""
    beside = Path(sys.executable).with_name(program)
    where = program if shutil.which(program) or not beside.exists() else os.path.relpath(beside)
    return shlex.join([where, *arguments])


def _table(*headings: str) -> Table:
    """A table without a frame; a heading that ends in `>` marks a right-aligned column of numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for heading in headings:
        name = heading.removesuffix(" >")
        table.add_column(name, justify="right" if name != heading else "left")
    return table


def as_line(summary: Summary) -> str:
    """The summary as one line of JSON."""
    return json.dumps(summary.as_object(), ensure_ascii=False)
