"""Commands that build one stage of an experiment, alone or under torchrun."""

import json
import logging
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from vectorclm.command_line import Place, Setting, explain
from vectorclm.config import ExperimentConfig, load_experiment, override, read_config
from vectorclm.errors import ConfigError, PreemptedError
from vectorclm.lineage.pinning import pin
from vectorclm.runtime import progress
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.group import Group
from vectorclm.runtime.preemption import PREEMPTED
from vectorclm.runtime.ranks import end_together, joined, record
from vectorclm.settings import validate
from vectorclm.stages import BY_NAME, TRAININGS, follow_stage, rebuild_stage, run_stage, summary_lines
from vectorclm.store.artifact import Store
from vectorclm.store.patience import PatientStore

STOPPING = f"""

SIGTERM ends the training after a checkpoint, with exit code {PREEMPTED}; the same command resumes from it.
A second SIGTERM ends the training at once.
"""


@Parameter(name="*")
@dataclass(frozen=True)
class StageOptions:
    """Options of a command that builds one stage."""

    place: Place = Place()
    settings: Setting = ()
    relay: Annotated[bool, Parameter(help="Report progress and errors as JSON lines to a parent process")] = False
    again: Annotated[bool, Parameter(help="Build a finished stage once more beside its artifact, and compare")] = False


def stage_command(stage: str) -> Callable[..., None]:
    """The command that builds one stage's artifact."""

    def command(
        experiment: Annotated[str, Parameter(help="tiny, small, base, or a TOML file")],
        /,
        *,
        options: StageOptions = StageOptions(),
    ) -> None:
        build_stage(stage, experiment, options)

    command.__doc__ = f"{BY_NAME[stage].about[0].upper()}{BY_NAME[stage].about[1:]}."
    if stage in TRAININGS:
        command.__doc__ += STOPPING
    return command


def add_stages(commands: App, names: Sequence[str], program: str) -> None:
    """Add one command for each named stage to the command line `program`."""
    for name in names:
        example = f"Example: {program} {name} tiny"
        commands.command(stage_command(name), name=name, help_epilogue=example)


def chosen(experiment: str, changes: Sequence[str]) -> tuple[ExperimentConfig, Path]:
    """Load the experiment that the command line names, apply its --set options, and return it with its file."""
    found, path = load_experiment(experiment)
    return override(found, changes), path


def load_runtime(path: Path | None) -> Runtime:
    """Load the runtime settings from a file; the defaults without one."""
    return Runtime() if path is None else validate(Runtime, read_config(path), str(path))


def build_stage(stage: str, experiment: str, options: StageOptions) -> None:
    """Build one stage's artifact and print its address; under torchrun, together with the other ranks.

    A training that SIGTERM ends prints a message, and ends all ranks with exit code PREEMPTED.
    """
    with joined(options.relay) as group:
        if group.world_size > 1 and stage not in TRAININGS:
            raise ConfigError(f"{stage} runs in one process: start it without torchrun")
        runtime = load_runtime(options.place.runtime)
        runtime.check(group)
        group.limit_hangs(runtime.hang_seconds)
        _check_shared(Store(options.place.store), group)
        try:
            if group.rank:
                follow_stage(stage, PatientStore(options.place.store), runtime, group)
            else:
                _lead_stage(stage, experiment, options, runtime, group)
        except PreemptedError as error:
            record(error)
            if group.local_rank == 0:  # each node's launcher reads it
                explain(error, relay=options.relay)
            end_together(group, PREEMPTED)


def _check_shared(store: Store, group: Group) -> None:
    """Have all nodes read what the first rank writes into the store.

    Raises ConfigError, naming the host, where a node has another store.
    """
    if group.world_size == group.local_world_size:
        return
    key = store.write_probe() if group.rank == 0 else ""
    shared, first, place = json.loads(group.share(json.dumps([key, socket.gethostname(), store.uri])))
    try:
        if store.read(shared) is None:
            raise ConfigError(
                f"{socket.gethostname()} does not see in its store {store.uri} what {first} writes in {place}: "
                "give all nodes the same --store, in a folder that they share or at s3://…"
            )
        group.total(0)  # all have read it
    finally:
        if group.rank == 0:
            store.delete(key)


def _lead_stage(stage: str, named: str, options: StageOptions, runtime: Runtime, group: Group) -> None:
    store, data, relay, again = PatientStore(options.place.store), options.place.data, options.relay, options.again
    experiment, path = chosen(named, options.settings)
    if not relay:  # the parent process has done both before the first stage
        store.check_writable()
        experiment, notes = pin(experiment, path, data, resolve=True)
        for note in notes:
            print(note, file=sys.stderr)
    show: AbstractContextManager[None] = progress.json_lines() if relay else progress.bars()
    with show:
        logging.basicConfig(format="%(message)s", stream=sys.stderr)  # log lines then stand above the bars
        logging.getLogger("vectorclm").setLevel(logging.INFO)
        artifact, reused = (rebuild_stage if again else run_stage)(stage, experiment, store, runtime, data, group)
    if not relay:
        state = "built again, the same to the byte" if reused and again else "reused" if reused else "built"
        print(f"{stage} {state}: {artifact.uri}")
        for line in summary_lines(stage, artifact.summary):
            print(line)
