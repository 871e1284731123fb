"""Where trials take place: a store of their own, a work folder, and an undisturbed run to compare with."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vectorclm.chaos.fault_proxy import FaultProxy
from vectorclm.chaos.shifted_clock import ShiftedClock
from vectorclm.chaos.small_experiment import small_experiment, write_files
from vectorclm.chaos.stage_process import Ended, StageProcess
from vectorclm.errors import StoreError
from vectorclm.settings import digest
from vectorclm.stages import TRAININGS, plans
from vectorclm.store.artifact import Artifact, Store, without_speed

METRICS = "metrics.jsonl"
LIMIT_SECONDS = 300.0  # for a stage of a few seconds: more is a hang


@dataclass(frozen=True)
class Undisturbed:
    """A stage that nobody disturbed."""

    seconds: float  # from the start of the process to its end
    begins: float  # until its first report of progress
    files: Mapping[str, str]  # file name -> SHA-256, of the metrics without their speed
    units_per_step: float  # of a training; 0 for another stage


class Place:
    """The store folder, work folder and expectations of one run of the tool."""

    def __init__(self, store: Store, folder: Path, proxy: FaultProxy | None, clock: ShiftedClock | None) -> None:
        self.store, self.folder, self.proxy, self.clock = store, folder, proxy, clock
        self.mark = str(folder)
        experiment = small_experiment()
        self.specs = plans(experiment)
        self.stages = tuple(self.specs)
        write_files(experiment, folder)
        self.undisturbed: dict[str, Undisturbed] = {}

    def start(
        self,
        stage: str,
        store: Store,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        runtime: str = "runtime",
    ) -> StageProcess:
        """Start the command that builds a stage, as `vectorclm run` and a platform start it."""
        command = [sys.executable, "-m", "vectorclm", stage, str(self.folder / "experiment.json")]
        command += ["--store", store.uri, "--relay", "--runtime", str(self.folder / f"{runtime}.json")]
        own = {"XDG_CACHE_HOME": str(self.folder / "cache"), "NO_PROXY": "127.0.0.1"}
        return StageProcess(command, {**own, **(environment or {})}, self.mark, prefix)

    def build(self, stage: str, store: Store) -> tuple[StageProcess, float]:
        """Build a stage undisturbed; return its ended process and its seconds. Raises StoreError where that fails."""
        process = self.start(stage, store)
        try:
            ended = process.wait(LIMIT_SECONDS)
        finally:
            process.end()
        if ended is None or ended.code != 0:
            why = "it hangs" if ended is None else ended.in_words
            raise StoreError(f"{stage} fails undisturbed in {store.uri}: {why}")
        return process, process.seconds

    def find(self, stage: str, store: Store) -> Artifact | None:
        """The finished artifact of a stage."""
        return store.find(stage, self.specs[stage].fingerprint)

    def know(self, stage: str) -> Undisturbed:
        """What an undisturbed run of a stage is like; the stage and those before are built once for that.

        Raises StoreError where one fails.
        """
        memory = self.folder / "undisturbed.json"
        key = digest({name: spec.fingerprint for name, spec in self.specs.items()})
        if not self.undisturbed and memory.is_file():  # an earlier call was interrupted
            known = json.loads(memory.read_text(encoding="utf-8"))
            if known["key"] == key:
                self.undisturbed = {name: Undisturbed(**values) for name, values in known["stages"].items()}
        for name in self.stages[: self.stages.index(stage) + 1]:
            if name not in self.undisturbed:
                self.undisturbed[name] = self._measure(name, Store(f"{self.store.uri}/undisturbed"))
                text = {"key": key, "stages": {name: asdict(values) for name, values in self.undisturbed.items()}}
                part = memory.with_suffix(".part")
                part.write_text(json.dumps(text), encoding="utf-8")
                part.rename(memory)
        return self.undisturbed[stage]

    def know_faster(self, stage: str, process: StageProcess) -> None:
        """Remember that a stage may end earlier than it once did, such as on a machine that was busy then."""
        known = self.know(stage)
        begins = process.ticks[0][0] - process.began if process.ticks else 0.0
        seconds = min(known.seconds, process.seconds)
        self.undisturbed[stage] = replace(known, seconds=seconds, begins=min(known.begins, begins, seconds))

    def _measure(self, stage: str, store: Store) -> Undisturbed:
        if self.find(stage, store) is not None:  # of a call that was interrupted before it could measure
            store.remove(f"{stage}/{self.specs[stage].fingerprint}")
        process, seconds = self.build(stage, store)
        artifact = self.find(stage, store)
        assert artifact is not None
        steps = artifact.summary["steps"] if stage in TRAININGS else 0
        begins = process.ticks[0][0] - process.began if process.ticks else seconds / 2
        return Undisturbed(seconds, min(begins, seconds), contents(artifact), process.done / steps if steps else 0.0)

    def lost(self, stage: str, store: Store) -> list[str]:
        """What of a stage's artifact is missing, differs from the undisturbed one, or is there twice."""
        there, wanted = store.list(stage), self.specs[stage].fingerprint
        if there != [wanted]:
            return [f"the store has {', '.join(there) or 'nothing'} at {stage}, and not the one artifact {wanted}"]
        try:
            artifact = self.find(stage, store)
            if artifact is None:
                return [f"{stage} is not finished"]
            artifact.verify()
            found, expected = contents(artifact), self.undisturbed[stage].files
        except StoreError as error:
            return [str(error)]
        return [
            f"{name} differs from the undisturbed run's"
            for name in sorted({*found, *expected})
            if found.get(name) != expected.get(name)
        ]


def contents(artifact: Artifact) -> dict[str, str]:
    """SHA-256 of each file of an artifact; of the metrics without their speed, each step once."""
    files: Mapping[str, Any] = artifact.manifest["files"]
    found = {name: str(file["sha256"]) for name, file in files.items()}
    if METRICS in found:
        found[METRICS] = digest({"lines": without_speed(artifact.read(METRICS))})
    return found


def ended_or_killed(process: StageProcess, seconds: float) -> Ended | None:
    """The end of a process; None where it had to be killed after so many seconds."""
    found = process.wait(seconds)
    if found is None:
        process.end()
    return found
