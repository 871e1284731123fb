"""The `vectorclm` command: a whole experiment, or one of the core's own commands.

Prefect and MLflow take seconds to import, so only a command that needs them does.
"""

import argparse
import gc
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args, get_origin

from rich.console import Console

from flows import benches, lineage, report
from flows.form import Name
from flows.server import PrivateServer, has_own_server, local_folder, prefect_server
from vectorclm import __main__ as core
from vectorclm.artifact import Artifact, Store, default_store
from vectorclm.command_line import CommandParser
from vectorclm.config import ExperimentConfig, load_experiment, override
from vectorclm.errors import ConfigError, VectorCLMError
from vectorclm.pinning import check_sources, pin
from vectorclm.progress import Tick, bars
from vectorclm.runtime import Runtime
from vectorclm.settings import validate
from vectorclm.stages import STAGES, plans

PLATFORM = {
    "up": "start the platform: Prefect server, MLflow, workers, deployments with run forms",
    "down": "stop the platform; `up` goes on from there",
    "retry": "run a curriculum once more with other settings, or make finished stages again and compare",
    "doctor": "look at every part of the platform and mend what can be mended",
}
OWN_COMMANDS = {"bench": benches, "lineage": lineage, "report": report}
PROGRESS = {"vectorclm.progress": logging.INFO}
TOLD = {
    "flows": logging.INFO,
    "vectorclm": logging.WARNING,
}  # what a person sees of the log without --verbose
REPORT_SECONDS = 30
END_SECONDS = 25  # after Ctrl-C; a stage in the middle of a library's call cannot be asked to stop


def command_line() -> CommandParser:
    """The parser of `vectorclm`, with all its commands."""
    parser = CommandParser("vectorclm", description="From raw text to an instruction-tuned language model.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_platform(commands)
    _add_promote(commands)
    for made in OWN_COMMANDS.values():
        made.add_command(commands, default_store())
    core.add_commands(commands, "a folder, <store>/<stage>/<fingerprint>, models:/NAME@ALIAS or models:/NAME/VERSION")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 where all went well, 2 for an error that its message explains, 130 after Ctrl-C."""
    gc.freeze()  # what is imported stays, so no collection of garbage need look at it
    args = command_line().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    try:
        if args.command == "run":
            _run(args)
        elif args.command in PLATFORM:
            return _platform(args)
        elif args.command == "promote":
            from flows.promotion import promote

            return promote(args.target, args.task, Store(args.store), Console())
        elif args.command in OWN_COMMANDS:
            return int(OWN_COMMANDS[args.command].command(args))
        else:
            if args.command == "compare":
                sides = (args.before, args.after)
                args.before, args.after = (_registered(side, args.store) for side in sides)
            elif _takes_registered(args):
                if args.command == "serve" and args.target.startswith("models:/"):
                    args.name = args.name or args.target.removeprefix("models:/")
                args.target = _registered(args.target, args.store)
            if args.command == "evaluate" and args.suite is not None and not args.every_checkpoint:
                _record(args.target.rstrip("/"), core.measure_model(args), Store(args.store))
                return 0
            return core.run_command(args)
    except VectorCLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if args.command == "run":
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
        kind, about = field.annotation, field.description
        options: dict[str, Any] = {"type": int if kind is int else str}
        if get_origin(kind) is Literal:
            options = {"choices": get_args(kind)}
        elif kind is bool:
            options = {"action": "store_true", "default": None}
        machine.add_argument(f"--{name.replace('_', '-')}", dest=f"runtime_{name}", help=about, **options)


def _add_platform(commands: Any) -> None:
    for name, about in PLATFORM.items():
        parser = commands.add_parser(name, help=about, description=about)
        default = default_store()
        parser.add_argument("--store", metavar="URI", help=f"where artifacts are kept ({default})")
        parser.add_argument("--env-file", type=Path, metavar="FILE", help="settings, as in docker/platform.env.example")
        parser.add_argument("--prefect-port", type=int, metavar="N", help="(4200)")
        parser.add_argument("--mlflow-port", type=int, metavar="N", help="(5000)")
        if name == "retry":
            parser.add_argument("target", metavar="RUN", help="the run's id, or its name for the newest of that name")
            parser.add_argument(
                "--from", dest="again_from", choices=STAGES, help="make this stage and what follows again, and compare"
            )
            parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")


def _add_promote(commands: Any) -> None:
    about = "make a registered model the champion, where it beats the present one by more than the noise"
    parser = commands.add_parser("promote", help=about, description=about)
    default = "models:/vectorclm-chat@candidate"
    parser.add_argument("target", nargs="?", default=default, metavar="MODEL", help="(%(default)s)")
    place = default_store()
    parser.add_argument("--store", default=place, metavar="URI", help="where artifacts are kept (%(default)s)")
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME",
        help="a score that must be better, such as hellaswag or bits_per_byte.stories; may be repeated (every task)",
    )


def _platform(args: argparse.Namespace) -> int:
    """Start, stop or mend the platform; 1 where the doctor found what it could not mend."""
    from flows import doctor
    from flows.platform import read_platform

    ports = {"prefect_port": args.prefect_port, "mlflow_port": args.mlflow_port}
    config, console = read_platform(args.env_file, vectorclm_store=args.store, **ports), Console()
    if args.command == "retry":
        doctor.point_at(config)
        return _retry(args, config, console)
    with doctor.alone(config, console, starts=args.command == "up"):
        if args.command == "doctor":
            return 0 if doctor.doctor(config, console) else 1
        (doctor.up if args.command == "up" else doctor.down)(config, console)
    return 0


def _retry(args: argparse.Namespace, config: Any, console: Console) -> int:
    from flows.retry import retry

    run_id = retry(args.target, args.again_from, args.set)
    console.print(f"{config.prefect_url}/runs/flow-run/{run_id}", highlight=False, soft_wrap=True)
    return 0


def _takes_registered(args: argparse.Namespace) -> bool:
    return args.command in ("chat", "serve") or any(getattr(args, name, None) for name in ("suite", "format", "text"))


def _registered(address: str, store: str) -> str:
    """Where the files of a registered model are; any other address as it stands."""
    if not address.startswith("models:/"):
        return address
    from flows.registry import Registry

    return Registry(Store(store)).find(address).address


def _record(address: str, scores: Artifact, store: Store) -> None:
    """Tell MLflow, where there is one, what a model scored that it knows."""
    if not lineage.has_record(store):
        return
    from flows.registry import Registry, RegistryError

    try:
        page = Registry(store).record_by_hand(address, scores)
    except RegistryError as error:
        print(f"warning: {error}; the result is in the store and not in MLflow", file=sys.stderr)
    else:
        if page is not None:
            print(f"recorded in MLflow: {page}", file=sys.stderr)


def _runtime(args: argparse.Namespace) -> Runtime:
    chosen = core.load_runtime(args.runtime).model_dump()
    given = {name: getattr(args, f"runtime_{name}") for name in Runtime.model_fields}
    return validate(Runtime, {**chosen, **{key: value for key, value in given.items() if value is not None}}, "options")


def _run(args: argparse.Namespace) -> None:
    experiment, path = load_experiment(args.target)
    experiment, runtime, store = override(experiment, args.set), _runtime(args), Store(args.store)
    if args.dry_run:
        _dry_run(experiment, path, store, args)
        return
    runtime.check()
    if runtime.placement == "pools" and not has_own_server():
        raise ConfigError("placement pools needs a Prefect server with workers: set PREFECT_API_URL, or use inline")
    if runtime.placement == "pools" and experiment.name not in get_args(Name):
        raise ConfigError(
            f"placement pools knows {', '.join(get_args(Name))}, not {experiment.name}: run that one inline"
        )
    store.check_writable()
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if args.verbose else "CRITICAL")
    with _interruptible(), prefect_server(local_folder(store) / ".prefect") as server:  # which starts up meanwhile
        experiment, notes = pin(experiment, path, args.data, resolve=True)
        check_sources(experiment, args.data, hub=True)
        console = Console(stderr=True)
        for note in notes:
            console.print(note, style="yellow", highlight=False)
        handles = _curriculum(experiment, runtime, store, args, console, server)
    from flows.summary import Summary, as_line

    summary = Summary(experiment, store, handles)
    if args.json:
        print(as_line(summary))
    else:
        summary.show(Console())


def _dry_run(experiment: ExperimentConfig, path: Path, store: Store, args: argparse.Namespace) -> None:
    from flows.budget import budget, known_windows, show

    pinned, notes = pin(experiment, path, args.data, resolve=False)
    made = plans(pinned)
    costs = budget(pinned, made, known_windows(store, made["shards"]))
    if args.json:
        print(json.dumps(costs))
        return
    for note in notes:
        print(note, file=sys.stderr)
    show(pinned, costs, Console())


def _curriculum(
    experiment: ExperimentConfig,
    runtime: Runtime,
    store: Store,
    args: argparse.Namespace,
    console: Console,
    server: PrivateServer | None,
) -> dict[str, Any]:
    """Run the flow against the user's Prefect server, or the private one, with progress on standard error."""
    from flows.curriculum import curriculum

    if server is not None:
        server.wait()
    with ExitStack() as stack:
        stack.callback(_flush_logs)  # before the server goes
        stack.enter_context(bars(console) if console.is_terminal else _attached(_Reports(console), PROGRESS))
        if not args.verbose:
            stack.enter_context(_attached(_Lines(console), TOLD))
        data = str(args.data.absolute()) if args.data is not None else None
        return curriculum(experiment, runtime, store.uri, data)


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
