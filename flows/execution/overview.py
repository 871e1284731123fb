"""The overview of a run: one Markdown artifact that renews itself, with stages, loss, samples, results and links."""

import json
import logging
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from uuid import UUID

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.runtime import flow_run

from flows.handle import duration
from vectorclm.runtime.progress import Tick
from vectorclm.stages import BY_NAME, TRAININGS

RENEW_SECONDS = 5.0
KEY = "overview"
LOSSES = 8  # points of the table of losses
SAMPLES = 2  # samples of a training that is at work
COLUMNS = 96  # characters in a line of a sample: Prefect's page does not wrap them
WEIGHTS = {"pretrain": 10, "finetune": 4}  # of a stage in the progress of a run; of others 1
WAITING, RUNNING, BUILT, REUSED, FAILED = "waiting", "running", "built", "reused", "failed"
MARKS = {WAITING: "·", RUNNING: "▶", BUILT: "✔", REUSED: "✔", FAILED: "✘"}
TICKS = logging.getLogger("vectorclm.runtime.progress")

logger = logging.getLogger(__name__)


@dataclass
class _Row:
    """What is known about a stage."""

    state: str = WAITING
    tick: Tick | None = None
    first: tuple[float, int] | None = None  # time and units of its first tick
    folder: Path | None = None  # of its work
    note: str = ""
    seconds: float = 0.0


@dataclass
class Overview(logging.Handler):
    """The overview of one run; a context manager that renews the artifact in a thread and once more at the end."""

    title: str
    stages: Sequence[str]
    links: dict[str, str] = field(default_factory=dict)  # by title; those that open in a browser
    results: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self.rows = {name: _Row() for name in self.stages}
        self._artifact: UUID | None = None
        self._shown = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="overview", daemon=True)

    __hash__ = logging.Handler.__hash__

    def __enter__(self) -> Self:
        text = self.as_markdown()
        with suppress(Exception):  # a lost server stops no run
            self._artifact = show(KEY, text, "What runs, and what came of it; renewed every few seconds")
        TICKS.addHandler(self)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        TICKS.removeHandler(self)
        for row in self.rows.values():
            if kind is not None and row.state == RUNNING:
                row.state = FAILED
        self._ended.set()
        self._thread.join(2 * RENEW_SECONDS)

    def emit(self, record: logging.LogRecord) -> None:
        tick = getattr(record, "tick", None)
        if isinstance(tick, Tick) and (row := self.rows.get(tick.stage)) is not None:
            row.first = row.first or (time.monotonic(), tick.done)
            row.tick = tick

    def begins(self, stage: str, folder: Path | None = None) -> None:
        """Show that a stage is at work; its metrics and samples appear in `folder`."""
        self.rows[stage].state, self.rows[stage].folder = RUNNING, folder

    def ends(self, stage: str, state: str, seconds: float = 0.0, note: str = "") -> None:
        """Show the end of a stage: built, reused or failed."""
        row = self.rows[stage]
        row.state, row.seconds, row.note = state, seconds, note

    def _work(self) -> None:
        with suppress(Exception), get_client(sync_client=True) as client:
            while not self._ended.wait(RENEW_SECONDS):
                self._renew(client)
            self._renew(client)

    def _renew(self, client: SyncPrefectClient) -> None:
        text = self.as_markdown()
        if self._artifact is None or text == self._shown:
            return
        try:
            client.update_artifact(self._artifact, ArtifactUpdate(data=text))
            self._shown = text
        except Exception as error:  # of any kind: the run goes on
            logger.debug("the overview was not renewed: %s", error)

    def as_markdown(self) -> str:
        """The overview as Markdown: links, stages, and either the results or the losses and samples so far."""
        lines = [f"## {self.title}: {self._percent()} %", ""]
        if self.links:
            lines += [" · ".join(f"[{title}]({url})" for title, url in self.links.items()), ""]
        lines += ["| | stage | state | progress | time |", "|---|---|---|---:|---|"]
        lines += [_stage_line(name, row) for name, row in self.rows.items()]
        if self.results:
            return "\n".join([*lines, "", "### Results", "", self.results])
        for name, row in self.rows.items():
            if name in TRAININGS and row.state == RUNNING and row.folder is not None:
                lines += _training(name, row.folder)
        return "\n".join(lines)

    def _percent(self) -> int:
        """How much of the work of this run is done; a reused stage is no work."""
        work = [(WEIGHTS.get(name, 1), _share(row)) for name, row in self.rows.items() if row.state != REUSED]
        whole = sum(weight for weight, _ in work)
        return int(100 * sum(weight * share for weight, share in work) / whole) if whole else 100


def show(key: str, text: str, about: str) -> UUID:
    """Create a Markdown artifact of the present run, or renew the one of an attempt before; returns its id."""
    if flow_run.id is not None:
        mine = {"key": {"any_": [key]}, "flow_run_id": {"any_": [flow_run.id]}}
        with get_client(sync_client=True) as client:
            for found in client.read_artifacts(artifact_filter=ArtifactFilter.model_validate(mine)):
                client.update_artifact(found.id, ArtifactUpdate(data=text, description=about))
                return found.id
    return cast(UUID, create_markdown_artifact(text, key=key, description=about))


def _stage_line(name: str, row: _Row) -> str:
    share, left = "", row.note
    if row.state in (BUILT, REUSED):
        share = "100 %"
        left = row.note or (duration(row.seconds) if row.state == BUILT else "")
    elif (tick := row.tick) is not None and row.state != WAITING:
        share = f"{100 * _share(row):.0f} %"
        left = row.note or _time_left(tick, row.first)
    return f"| {MARKS[row.state]} | {name}: {BY_NAME[name].about} | {row.state} | {share} | {left} |"


def _share(row: _Row) -> float:
    """How much of a stage is done, from 0 to 1."""
    if row.state in (BUILT, REUSED):
        return 1.0
    if row.tick is None or row.state == WAITING:
        return 0.0
    return min(1.0, row.tick.done / max(1, row.tick.total))


def _time_left(tick: Tick, first: tuple[float, int] | None) -> str:
    if first is None or not first[1] < tick.done < tick.total:
        return ""
    return f"{duration((time.monotonic() - first[0]) * (tick.total - tick.done) / (tick.done - first[1]))} left"


def _training(name: str, folder: Path) -> list[str]:
    """The losses so far of a training, and its newest samples, from its work folder."""
    losses = [line for line in _lines(folder, "metrics.jsonl") if "loss" in line]
    lines: list[str] = []
    if losses:
        places = sorted({round(number * (len(losses) - 1) / (LOSSES - 1)) for number in range(LOSSES)})
        picked = [losses[place] for place in places]
        lines += [
            "",
            f"### Loss of {name} so far",
            "",
            "| step | " + " | ".join(f"{x['step']:,}" for x in picked) + " |",
        ]
        lines += ["|---" * (len(picked) + 1) + "|", "| loss | " + " | ".join(f"{x['loss']:.3f}" for x in picked) + " |"]
    if samples := _lines(folder, "samples.jsonl"):
        lines += ["", f"### Samples at step {samples[-1]['step']:,}"]
        for sample in samples[-1]["samples"][:SAMPLES]:
            answer = sample["answer"].strip() or "(nothing)"
            lines += ["", f"**{sample['prompt']}**", "", *(f"    {line}" for line in _wrapped(answer))]
    return lines


def _wrapped(text: str) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, COLUMNS) or [""]]


def _lines(folder: Path, name: str) -> list[Mapping[str, Any]]:
    """The complete lines of the newest file of this name in a work folder, which the attempt may remove meanwhile."""
    files = list[tuple[float, Path]]()
    for path in (folder / name, *folder.glob(f"*/{name}")):
        with suppress(OSError):
            files.append((path.stat().st_mtime, path))
    with suppress(OSError, ValueError):
        text = max(files)[1].read_text(encoding="utf-8") if files else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return []
