"""The `vectorclm` command: a whole experiment, or one of the core's own commands.

Prefect and MLflow take seconds to import, so only a command that needs them does.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast, get_args, get_origin

from rich.console import Console

from vectorclm import __main__ as core
from vectorclm.artifact import Store
from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.errors import ConfigError, VectorCLMError
from vectorclm.pinning import check_sources, pin
from vectorclm.progress import Tick, bars
from vectorclm.runtime import Runtime
from vectorclm.settings import validate
from vectorclm.stages import plans

PROGRESS = {"vectorclm.progress": logging.INFO}
TOLD = {
    "flows": logging.INFO,
    "vectorclm": logging.WARNING,
}  # what a person sees of the log without --verbose
REPORT_SECONDS = 30
END_SECONDS = 25  # after Ctrl-C; a stage in the middle of a library's call cannot be asked to stop


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 where all went well, 2 for an error that its message explains, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser("vectorclm", description="From raw text to an instruction-tuned language model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    core.add_commands(commands)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    try:
        if args.command == "run":
            _run(args)
        else:
            core.run_command(args)
    except VectorCLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: what is finished is kept, and the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _add_run(commands: Any) -> None:
    parser = commands.add_parser("run", help="run a whole experiment: text in, an evaluated chat model out")
    parser.add_argument(
        "target",
        nargs="?",
        default="tiny",
        metavar="EXPERIMENT",
        help="tiny, small, base, or a file (%(default)s)",
    )
    core.add_place(parser)
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object, and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="print fingerprints and costs, and do nothing")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the experiment, such as finetune.optimizer.learning_rate=0.001; may be repeated",
    )
    parser.add_argument("--verbose", action="store_true", help="show every log line")
    machine = parser.add_argument_group("this machine (never part of a result's fingerprint)")
    for name, field in Runtime.model_fields.items():
        kind = field.annotation
        options = {"choices": get_args(kind)} if get_origin(kind) is Literal else {"type": int if kind is int else str}
        about = (field.description or "").replace("%", "%%")
        machine.add_argument(f"--{name.replace('_', '-')}", dest=f"runtime_{name}", help=about, **options)


def override(experiment: ExperimentConfig, assignments: Sequence[str]) -> ExperimentConfig:
    """The experiment with `a.b.0.c=VALUE` applied; a value is TOML, or else a plain string.

    Raises ConfigError for what is no assignment, and for a key or value that the experiment has no use for.
    """
    values: Any = experiment.model_dump()
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write KEY=VALUE, such as finetune.epochs=2.0")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *path, last = key.strip().split(".")
        inside = values
        for part in path:
            inside = _member(inside, part, key)
        _member(inside, last, key, value)
    return validate(ExperimentConfig, values, "--set") if assignments else experiment


_ABSENT = object()


def _member(inside: Any, part: str, key: str, value: Any = _ABSENT) -> Any:
    """The member `part` of a table or list, set to `value` where one is given."""
    if isinstance(inside, list) and part.isdigit() and int(part) < len(inside):
        if value is not _ABSENT:
            inside[int(part)] = value
        return inside[int(part)]
    if not isinstance(inside, dict):
        where = f"number 0 to {len(inside) - 1}" if isinstance(inside, list) else "setting"
        raise ConfigError(f"--set {key}: {part!r} is no {where} here")
    if value is not _ABSENT:
        inside[part] = value
    elif inside.get(part) is None:
        inside[part] = {}  # an unknown key is then named by the experiment itself, with its neighbours
    return inside[part]


def _runtime(args: argparse.Namespace) -> Runtime:
    chosen = core.load_runtime(args.runtime).model_dump()
    given = {name: getattr(args, f"runtime_{name}") for name in Runtime.model_fields}
    return validate(Runtime, {**chosen, **{key: value for key, value in given.items() if value is not None}}, "options")


def _run(args: argparse.Namespace) -> None:
    experiment, path = load_experiment(args.target)
    experiment, runtime, store = override(experiment, args.set), _runtime(args), Store(args.store)
    if args.dry_run:
        _dry_run(experiment, path, args)
        return
    store.check_writable()
    experiment, notes = pin(experiment, path, args.data, resolve=True)
    check_sources(experiment, args.data, hub=True)
    console = Console(stderr=True)
    for note in notes:
        console.print(note, style="yellow", highlight=False)
    with _interruptible():
        handles = _curriculum(experiment, runtime, store, args, console)
    from flows.summary import Summary, as_line

    summary = Summary(experiment, store, handles)
    if args.json:
        print(as_line(summary))
    else:
        summary.show(Console())


def _dry_run(experiment: ExperimentConfig, path: Path, args: argparse.Namespace) -> None:
    from flows.budget import budget, show

    pinned, notes = pin(experiment, path, args.data, resolve=False)
    costs = budget(pinned, plans(pinned))
    if args.json:
        print(json.dumps(costs))
        return
    for note in notes:
        print(note, file=sys.stderr)
    show(pinned, costs, Console())


def _curriculum(
    experiment: ExperimentConfig, runtime: Runtime, store: Store, args: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Run the flow against the user's Prefect server, or a private one, with progress on standard error."""
    from flows.server import prefect_server

    home = Path(store.root).absolute() if store.is_local else Path.home() / ".local" / "share" / "vectorclm"
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if args.verbose else "CRITICAL")
    with ExitStack() as stack:
        server = stack.enter_context(prefect_server(home / (".prefect" if store.is_local else "prefect")))
        from prefect.task_runners import ThreadPoolTaskRunner

        from flows.curriculum import curriculum
        from flows.stages import default_workers

        if server is not None:
            server.wait()
        stack.callback(_flush_logs)  # before the server goes
        workers = runtime.parallel_stages or default_workers()
        runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=workers)
        flow = curriculum.with_options(task_runner=cast(Any, runner))
        stack.enter_context(bars(console) if console.is_terminal else _attached(_Reports(console), PROGRESS))
        if not args.verbose:
            stack.enter_context(_attached(_Lines(console), TOLD))
        data = str(args.data.absolute()) if args.data is not None else None
        return flow(experiment, runtime, store.uri, data)


def _flush_logs() -> None:
    """Have Prefect's server store the last log lines."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        for handler in logging.getLogger(name).handlers:
            handler.flush()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the block in good order, in END_SECONDS at the most; a second one ends it at once."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # children end with this process
        timer = threading.Timer(END_SECONDS, os._exit, [130])
        timer.daemon = True
        timer.start()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Lines(logging.Handler):
    """Log records as lines, above the progress bars where there are any."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "green"
        self.console.print(record.getMessage(), style=style, highlight=False, markup=False, soft_wrap=True)


class _Reports(logging.Handler):
    """Progress for a log file: a line a stage, and no more than one in REPORT_SECONDS."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console
        self._last: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        tick = getattr(record, "tick", None)
        now = time.monotonic()
        if isinstance(tick, Tick) and now - self._last.setdefault(tick.stage, now) > REPORT_SECONDS:
            self._last[tick.stage] = now
            line = f"{tick.stage} {tick.done:,} of {tick.total:,} {tick.unit}  {tick.note}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _attached(handler: logging.Handler, names: Mapping[str, int]) -> Iterator[None]:
    """Have the handler hear these loggers, from these levels up, while the block runs."""
    for name, level in names.items():
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
