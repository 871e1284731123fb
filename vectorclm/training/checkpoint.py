"""Checkpoints of a training run: weights and optimizer in safetensors, manifest last.

They lie at `{store}/checkpoints/{fingerprint}/step-…/`, so any worker can carry on where another was killed. A name
ends in a random part of the attempt that wrote it: one that stood still and continues neither writes into its
successor's checkpoints nor removes them. A resume takes the newest one that verifies. Its place in the data is its step
and two hashes, of the training order and of the data set: on others than these it does not resume.
"""

import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.store.artifact import Artifact, StageSpec, Store
from vectorclm.store.storage import explained

KEEP = 2  # older checkpoints are removed
STEP = re.compile(r"step-([0-9]+)(-[0-9a-f]{8})?")  # and the attempt that wrote it
AGAIN = "again"  # the folder beside them with those of a finished training that is made once more


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that the next step depends on."""

    step: int  # steps done
    model: Mapping[str, Tensor]
    optimizers: Mapping[str, Tensor]
    metrics: str  # the lines of metrics.jsonl and samples.jsonl up to this step
    order: str  # digest of the plan that says what the steps read


def snapshot(
    step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], metrics: str, order: str
) -> Snapshot:
    """Copy the tensors, so that training can go on while they are written."""
    tensors = {}
    for number, optimizer in enumerate(optimizers):
        for index, entries in optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                tensors[f"{number}.{index}.{name}"] = value.detach().to("cpu", copy=True)
    weights = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}
    return Snapshot(step, weights, tensors, metrics, order)


def restore(saved: Snapshot, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a snapshot's tensors back."""
    model.load_state_dict(saved.model)
    for number, optimizer in enumerate(optimizers):
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in saved.optimizers.items():
            owner, index, name = key.split(".")
            if int(owner) == number:
                entries.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


class Checkpoints:
    """The checkpoints of one plan, of a training on the data set whose identity is `data`.

    `save` returns at once and writes in a thread of its own, whose errors the next call raises. With `keep_all`, older
    checkpoints stay. A training that is made `again` has its own, so that it proves every step.
    """

    def __init__(
        self, store: Store, plan: StageSpec, work: Path, data: str, *, keep_all: bool = False, again: bool = False
    ) -> None:
        self.store = store
        self.plan = plan
        self.work = work
        self.data = data
        self.keep_all = keep_all
        self.root = f"checkpoints/{plan.fingerprint}" + (f"/{AGAIN}" if again else "")
        self.attempt = secrets.token_hex(4)
        self.known: list[str] = []  # those that were there when this attempt began, and its own
        self.resumed: str | None = None  # the one that `latest` found
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.writer.shutdown(wait=True)
        if kind is None:
            self.wait()

    def wait(self) -> None:
        """Until the last save is in the store; raises what it raised."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def save(self, saved: Snapshot) -> None:
        """Write a snapshot in the background, after the one before it.

        Raises InUseError where another process has taken the training over.
        """
        self.store.check_lease(self.plan.lease)
        self.wait()
        self.pending = self.writer.submit(self._write, saved)

    def _write(self, saved: Snapshot) -> None:
        name = f"step-{saved.step:08d}-{self.attempt}"
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with explained(str(folder)):
            save_file(dict(saved.model), folder / "model.safetensors")
            save_file(dict(saved.optimizers), folder / "optim.safetensors")
            (folder / "metrics.jsonl").write_text(saved.metrics)
        head = {"step": saved.step, "plan": self.plan.fingerprint, "order": saved.order, "data": self.data}
        self.store.publish_directory(f"{self.root}/{name}", folder, head)
        shutil.rmtree(folder)
        self.known.append(name)
        while len(self.known) > KEEP and not self.keep_all:
            self.store.remove(f"{self.root}/{self.known.pop(0)}")

    def clear(self) -> None:
        """Remove this training's checkpoints, but for those that a later attempt has written."""
        for name in self.known:
            self.store.remove(f"{self.root}/{name}")
        if self.store.is_local:
            for folder in (
                Path(self.store.path(self.root)),
                Path(self.store.path(f"checkpoints/{self.plan.fingerprint}")),
            ):
                with suppress(OSError):  # another attempt has something in it
                    folder.rmdir()

    def _steps(self) -> list[str]:
        return [name for name in self.store.list(self.root) if STEP.fullmatch(name)]

    def latest(self, order: str) -> Snapshot | None:
        """The newest checkpoint that verifies, or None. One that does not is removed, to be written anew.

        Raises DataError where it belongs to another data set, or to another training order than `order`.
        """
        self.known = self._steps()
        for name in reversed(self.known.copy()):
            try:
                if (found := self.store.find(self.root, name)) is not None:
                    self._check(found, order)
                    snapshot, self.resumed = self._load(found), name
                    return snapshot
            except CorruptArtifactError:
                pass
            self.store.remove(f"{self.root}/{name}")
            self.known.remove(name)
        return None

    def named(self, name: str) -> Snapshot:
        """The checkpoint of this name. Raises CorruptArtifactError where it is gone or does not verify."""
        if (found := self.store.find(self.root, name)) is None:
            raise CorruptArtifactError(f"{self.store.uri_of(self.root)}/{name} is gone: run the stage again")
        return self._load(found)

    def _check(self, found: Artifact, order: str) -> None:
        """Whether the training that goes on reads what this one read."""
        for key, here, what in (("data", self.data, "data set"), ("order", order, "training order")):
            before = str(found.manifest.get(key))
            if before != here:
                raise DataError(
                    f"{found.uri} was trained on the {what} {before[:12]}…, which is now {here[:12]}…: bring back what "
                    f"it was, or delete {self.store.uri_of(self.root)} to train from the beginning"
                )

    def _load(self, found: Artifact) -> Snapshot:
        """Its content; a remote store's files come as copies of this process's own, as all its ranks read at once."""
        self.work.mkdir(parents=True, exist_ok=True)
        with found.borrowed("model.safetensors", self.work) as file:
            model = load_file(file)
        with found.borrowed("optim.safetensors", self.work) as file:
            optimizers = load_file(file)
        metrics = found.read("metrics.jsonl").decode()
        return Snapshot(found.manifest["step"], model, optimizers, metrics, found.manifest["order"])
