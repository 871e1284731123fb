"""Checkpoints of a training run: weights and optimizer state in safetensors, with the manifest written last.

They are stored at `{store}/checkpoints/{fingerprint}/step-…/`, so any worker can resume a killed run. A name ends in
random digits of the attempt that wrote it, so an attempt that stalls and continues neither overwrites nor removes the
checkpoints of its successor. A resume uses the newest checkpoint that verifies. A checkpoint records its step and
the hashes of the training order and of the data set, and a run with another order or data set does not resume from it.
"""

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn

from vectorclm.errors import CorruptArtifactError, DataError, shortened
from vectorclm.formats.tensors import load_tensors
from vectorclm.nn.tensor_files import save_tensors
from vectorclm.store.artifact import Artifact, StageSpec, Store
from vectorclm.store.layout import STEP
from vectorclm.store.storage import explained

LOOK_SECONDS = 0.2  # between two checks whether the store is away
ENTRY = re.compile(r"[0-9]{1,4}\.[0-9]{1,6}\.\w+", re.ASCII)  # of an optimizer: its number, a parameter's, a name
KEEP = 2  # checkpoints; older ones are removed
AGAIN = "again"  # subfolder for the checkpoints of a finished training that is rebuilt


@dataclass(frozen=True)
class Snapshot:
    """A copy of the training state: all that the next step depends on."""

    step: int  # number of steps done
    model: Mapping[str, Tensor]
    optimizers: Mapping[str, Tensor]
    metrics: str  # the lines of metrics.jsonl and samples.jsonl up to this step
    order: str  # digest of the training order


def snapshot(
    step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], metrics: str, order: str
) -> Snapshot:
    """Copy the weights and the optimizer state to host memory, so that training continues while they are written."""
    tensors = {}
    for number, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                tensors[f"{number}.{index}.{name}"] = value.detach().to("cpu", copy=True)
    weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    return Snapshot(step, weights, tensors, metrics, order)


def restore(saved: Snapshot, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Load a snapshot into the model and the optimizers. Raises DataError where it belongs to another model."""
    try:
        _restore(saved, model, optimizers)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the checkpoint of step {saved.step:,} is of another model: {shortened(error)}") from error


def _restore(saved: Snapshot, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    model.load_state_dict(saved.model)
    for number, optimizer in enumerate(optimizers):
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in saved.optimizers.items():
            owner, index, name = key.split(".")
            if int(owner) == number:
                entries.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def step_of(name: str) -> int:
    """The number of steps done at the checkpoint of this name."""
    return int(name.split("-")[1])


class Checkpoints:
    """The checkpoints of one stage specification, trained on the data set with the identity `data`.

    `save` returns at once and writes in a background thread. The next call raises the thread's error. While the store
    is away, the newest snapshot waits for it. With `keep_all`, older checkpoints stay. A rebuild (`again`) has
    checkpoints of its own, so that it computes every step itself. `earlier` names trainings that equal this one up to a
    step, by fingerprint and step: without a checkpoint of its own, this training goes on from theirs.
    """

    def __init__(
        self, store: Store, spec: StageSpec, work: Path, data: str, *, keep_all: bool = False, again: bool = False
    ) -> None:
        self.store = store
        self.spec = spec
        self.work = work
        self.data = data
        self.keep_all = keep_all
        self.earlier: Sequence[tuple[str, int]] = ()
        self.root = f"checkpoints/{spec.fingerprint}" + (f"/{AGAIN}" if again else "")
        self.attempt = secrets.token_hex(4)
        self.known: list[str] = []  # names of this attempt's checkpoints and of those found at its start
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.newest: Snapshot | None = None  # that waits while an older one is written

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.writer.shutdown(wait=True)

    def wait(self) -> None:
        """Wait until the last save is in the store; raise its error, if it failed."""
        while self.pending is not None:
            self.pending.result()
            saved, self.newest = self.newest, None
            self.pending = None if saved is None else self.writer.submit(self._write, saved)

    def save(self, saved: Snapshot) -> None:
        """Write a snapshot in the background, after the previous one is written.

        While the store is away, the training goes on, and a newer snapshot replaces the one that waits. Raises
        InUseError where another process has taken over the training.
        """
        while self.pending is not None and not wait([self.pending], LOOK_SECONDS).done:
            if self.store.is_away:
                self.newest = saved
                return
        self.newest = None
        self.wait()
        self.pending = self.writer.submit(self._write, saved)

    def _write(self, saved: Snapshot) -> None:
        self.store.check_lease(self.spec.lease)
        name = f"step-{saved.step:08d}-{self.attempt}"
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with explained(str(folder)):
            save_tensors(saved.model, folder / "model.safetensors")
            save_tensors(saved.optimizers, folder / "optim.safetensors")
            (folder / "metrics.jsonl").write_text(saved.metrics)
        head = {"step": saved.step, "plan": self.spec.fingerprint, "order": saved.order, "data": self.data}
        self.store.publish_directory(f"{self.root}/{name}", folder, head)
        shutil.rmtree(folder)
        self.known.append(name)
        while len(self.known) > KEEP and not self.keep_all:
            self.store.remove(f"{self.root}/{self.known.pop(0)}")

    def clear(self) -> None:
        """Remove this training's checkpoints, except those of later attempts."""
        for name in self.known:
            self.store.remove(f"{self.root}/{name}")
        if self.store.is_local:
            for folder in (
                Path(self.store.path(self.root)),
                Path(self.store.path(f"checkpoints/{self.spec.fingerprint}")),
            ):
                with suppress(OSError):  # it holds another attempt's checkpoints
                    folder.rmdir()

    def _steps(self) -> list[str]:
        return [name for name in self.store.list(self.root) if STEP.fullmatch(name)]

    def latest(self, order: str) -> Snapshot | None:
        """The newest checkpoint that verifies, or None. A newer checkpoint that does not verify is removed.

        Raises DataError where it belongs to another data set or to a training order other than `order`.
        """
        self.known = self._steps()
        for name in reversed(self.known.copy()):
            try:
                if (found := self.store.find(self.root, name)) is not None:
                    self._check(found, order)
                    return self._load(found)
            except CorruptArtifactError:
                pass
            self.store.remove(f"{self.root}/{name}")
            self.known.remove(name)
        return self._latest_of_earlier(order)

    def _latest_of_earlier(self, order: str) -> Snapshot | None:
        """The newest checkpoint of an earlier training that verifies, up to the step to which it equals this one."""
        for fingerprint, last in self.earlier:
            root = f"checkpoints/{fingerprint}"
            for name in reversed([name for name in self.store.list(root) if STEP.fullmatch(name)]):
                with suppress(CorruptArtifactError):
                    found = self.store.find(root, name) if step_of(name) <= last else None
                    if found is not None:
                        self._check(found, order)
                        return self._load(found)
        return None

    def _check(self, found: Artifact, order: str) -> None:
        """Raise DataError where the checkpoint has another data set or training order than this run."""
        for key, here, what in (("data", self.data, "data set"), ("order", order, "training order")):
            before = str(found.manifest.get(key))
            if before != here:
                raise DataError(
                    f"{found.uri} was trained on the {what} {before[:12]}…, which is now {here[:12]}…: restore the old "
                    f"{what}, or delete {self.store.uri_of(self.root)} to train from the beginning"
                )

    def _load(self, found: Artifact) -> Snapshot:
        """Read a checkpoint; the files of a remote store are copied for as long as that takes."""
        self.work.mkdir(parents=True, exist_ok=True)
        with found.borrowed("model.safetensors", self.work) as file:
            model = load_tensors(file, CorruptArtifactError, floats=True)
        with found.borrowed("optim.safetensors", self.work) as file:
            optimizers = load_tensors(file, CorruptArtifactError)
        step = found.manifest.get("step")
        if type(step) is not int or step < 0 or not all(ENTRY.fullmatch(name) for name in optimizers):
            raise CorruptArtifactError(
                f"{found.uri} is not a checkpoint: its step or its optimizer's entries are wrong"
            )
        return Snapshot(step, model, optimizers, found.read("metrics.jsonl").decode(), str(found.manifest["order"]))
