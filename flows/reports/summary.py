"""The summary of a finished curriculum: tables for a person, one JSON object for a program."""

import json
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.text import Text

from flows.handle import Handle, duration
from flows.net import without_password
from flows.paths import local_folder
from flows.tracking.client import EXPERIMENTS_PAGE, tracking_uri
from flows.tracking.database import artifacts_destination
from vectorclm.command_line import shell_line, table
from vectorclm.comparison.compare import followed
from vectorclm.config import ExperimentConfig
from vectorclm.evaluation.instruction_checks import FOLLOWED
from vectorclm.evaluation.statistics import Change, share_error
from vectorclm.stages import BY_NAME, EVALUATED, EXPORTED, MODELS, READS
from vectorclm.store.artifact import Artifact, Store, default_store
from vectorclm.store.layout import EXPORT

ANSWERS = 3  # number of sample answers shown
WIDE = 70  # columns from which the scores have their standard errors
BASELINES = ("chance", "counting")  # accuracies without a model: of a blind guess, and of counting words
COUNTING = "counting: answers by words that occur together, without a model"
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
        tasks, lines = self.scores["base"]["tasks"], list[str]()
        baselines = _baselines(tasks)
        if tasks:
            lines.append(f"| questions | {' | '.join(baselines)} | {heads} |")
            lines.append(f"|---|{'---:|' * len(baselines)}{rules}")
        for label, task in tasks.items():
            values = [task.get(name) for name in baselines]
            values += [self.scores[kind]["tasks"][label]["acc"] for kind in self.titles]
            lines.append(f"| {label} | {' | '.join('' if value is None else f'{value:.1%}' for value in values)} |")
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

    def show(self, console: Console, *, details: bool = False) -> None:
        """Print what happened, the scores, a few answers and what to do next; with `details`, every table first."""
        console.print()
        if details:
            tables = (self._stages(), self._training(), self._texts(), *self._instructions())
            title = f"[bold]{self.experiment.name}[/]"
            console.print(Panel(Group(*tables), title=title, box=box.ROUNDED, padding=(0, 2)))
            for heading, place in self._places():  # never wrapped, so that they can be copied
                console.print(f"[dim]{heading:<11}[/] {escape(place)}", soft_wrap=True, highlight=False)
            console.print()
        console.print(self._headline(), highlight=False)
        console.print(self._tasks(console.width) if self.scores["base"]["tasks"] else self._texts())
        console.print(self._ends(), highlight=False)
        console.print(self._answers())
        console.print("\n[dim]next[/]")
        for line in self.next_commands():
            console.print(f"  {escape(line)}", soft_wrap=True, highlight=False)

    def _headline(self) -> str:
        """What happened, in one line."""
        built = [handle["seconds"] for handle in self.handles.values() if handle["state"] == "built"]
        done = f"{len(built)} of {len(self.handles)} stages built in {duration(sum(built))}"
        if not built:
            done = "every stage was built before"
        parameters = self._of(EXPORTED["base"]).summary["parameters"]
        model = f"a {self.titles[self.last]} of {parameters:,} parameters"
        return f"[bold]{escape(self.experiment.name)}[/]: {model}; {done}"

    def next_commands(self) -> list[str]:
        """Three commands that go on from here, as they work in the present folder."""
        default = Store(default_store()).uri == self.store.uri
        store = () if default else ("--store", self.store.uri)
        use, name = "chat" if self.last == "chat" else "serve", self.experiment.name
        return [
            shell_line("vectorclm", use, name, *store),
            shell_line("vectorclm", "report", name, "--open", *store),
            shell_line("vectorclm", "init", "--help"),
        ]

    def _stages(self) -> RenderableType:
        shown = table("stage", "state", "time >", "fingerprint")
        for name, handle in self.handles.items():
            built = handle["state"] == "built"
            state = "[green]built[/]" if built else "[cyan]reused[/]"
            shown.add_row(name, state, duration(handle["seconds"]) if built else "", handle["fingerprint"][:12])
        return shown

    def _training(self) -> RenderableType:
        shown = table("training", "steps >", "tokens >", "first >", "last loss >", "held-out >", "tokens/s >")
        for stage in (name for name in READS if name in self.handles):
            summary = self._of(stage).summary
            held_out = fmean(item["loss"] for item in summary["validation"].values())
            shown.add_row(
                stage,
                f"{summary['steps']:,}",
                f"{summary['tokens']:,}",
                f"{summary['first_loss']:.3f}",
                f"[bold]{summary['last_loss']:.3f}[/]",
                f"{held_out:.3f}",
                f"{summary['tokens_per_second']:,.0f}",
            )
        return shown

    def _texts(self) -> RenderableType:
        shown = table("held-out text, bits per byte", *(f"{title} >" for title in self.titles.values()))
        for label in self.scores["base"]["bits_per_byte"]:
            shown.add_row(label, *(f"{self.scores[kind]['bits_per_byte'][label]:.4f}" for kind in self.titles))
        return shown

    def _tasks(self, width: int) -> RenderableType:
        """The scores of multiple choice beside a blind guess and, where it was measured, beside counting words."""
        tasks, narrow = self.scores["base"]["tasks"], width < WIDE
        baselines = _baselines(tasks)
        shown = table("questions", *(f"{name} >" for name in (*baselines, *self.titles.values())))
        if narrow:
            shown.box, shown.padding = None, (0, 1, 0, 0)
        if "counting" in baselines:
            shown.caption, shown.caption_justify = COUNTING, "left"
        for column in shown.columns[: 1 + len(baselines)]:
            column.no_wrap = True
        for label, task in tasks.items():
            found = [self.scores[kind]["tasks"][label] for kind in self.titles]
            known = [share_error(item["acc"], item["items"]) for item in found]
            errors = [""] * len(found) if narrow else [f" ± {error:.1%}" for error in known]
            figures = [f"[bold]{item['acc']:.1%}[/]{error}" for item, error in zip(found, errors, strict=True)]
            shown.add_row(label, *(f"{task[name]:.1%}" if name in task else "" for name in baselines), *figures)
        return shown

    def _ends(self) -> str:
        """How often the chat model ends its answers; empty for a base model."""
        counts = self.scores[self.last].get("chat")
        return f"ends its answers: {counts['answered_in_template']} of {counts['prompts']}\n" if counts else ""

    def _instructions(self) -> list[RenderableType]:
        names = [f"{title} >" for title in self.titles.values()]
        shown = table("instructions followed", *names, "difference, 95 % >")
        for change in self.followed:
            figures = [f"[bold]{item.value:.1%}[/] ± {item.stderr:.1%}" for item in (change.before, change.after)]
            shown.add_row(FOLLOWED[change.name], *figures, _margin(change))
        counts = self.scores[self.last].get("instructions", {})
        if counts:
            shown.add_row("ends its answers", "", f"[bold]{counts['ended']} of {counts['prompts']}[/]", "")
        return [shown] if self.followed else []

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
            look = [("MLflow", shell_line("mlflow", "ui", "--backend-store-uri", uri, *files, "--port", "5000"))]
            look += [("", f"http://localhost:5000{page}")]
        else:
            place = without_password(uri).rstrip("/")
            look = [("MLflow", place + page if place.startswith("http") else place)]
        return [
            *look,
            ("artifacts", self.store.uri),
            *((TITLES[kind], place) for kind, place in self.models.items()),
        ]


def _baselines(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The accuracies without a model that these benchmarks have."""
    return [name for name in BASELINES if any(name in task for task in tasks.values())]


def _margin(change: Change) -> str:
    """The difference between the models in percentage points, its 95 % interval and the verdict."""
    assert change.paired is not None
    points = [f"{100 * value:+.1f}" for value in (change.difference, change.paired.low, change.paired.high)]
    return f"{points[0]} ({points[1]} to {points[2]}), {change.verdict}"


def as_line(summary: Summary) -> str:
    """The summary as one line of JSON."""
    return json.dumps(summary.as_object(), ensure_ascii=False)
