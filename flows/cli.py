"""The command line `vectorclm`: run an experiment, operate the platform, or use a model.

Prefect, MLflow and torch take seconds to import, so only the commands that need them import them.
"""

import gc
import json
import logging
import os
import signal
import sys
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from inspect import BoundArguments
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from flows.bench.cli import bench_app
from flows.net import has_own_server
from flows.paths import local_folder
from flows.platform.options import PlatformOptions
from flows.platform.prefect_server import PrivateServer, parameters_fit, prefect_server
from flows.platform.removal_commands import remove_from_store
from flows.platform.schedule_commands import schedule_app
from flows.reports import lineage_cli
from flows.run_names import of_the_command_line
from flows.terminal import LogLines, ProgressLines, attached, flush_logs, interruptible
from flows.tracking import lookup
from vectorclm.__main__ import ALONE, MODEL_COMMANDS
from vectorclm.chaos.chaos_commands import chaos
from vectorclm.command_line import Json, Place, Setting, StoreOptions, explain, new_app, parse, run
from vectorclm.config import ExperimentConfig, assignments, experiment_here
from vectorclm.draft.draft_commands import init
from vectorclm.errors import ConfigError, StoreError, VectorCLMError
from vectorclm.lineage.pinning import check_sources, pin
from vectorclm.model_commands import ChatOptions, ServeOptions, chat, compare, evaluate, export, models, serve
from vectorclm.planner.planner_commands import planners
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.progress import bars
from vectorclm.runtime.ranks import refuse_without_torchrun
from vectorclm.settings import validate
from vectorclm.stage_commands import add_stages, chosen, load_runtime
from vectorclm.stages import plans
from vectorclm.store.artifact import Artifact, Store, default_store
from vectorclm.store.commands import store_app
from vectorclm.store.layout import STAGES, StageName
from vectorclm.store.model_names import NAMES, REGISTERED, UnknownModelError, existing_store, is_place

PROGRESS = {"vectorclm.runtime.progress": logging.INFO}
LOG_LEVELS = {"flows": logging.INFO, "vectorclm": logging.WARNING}  # shown without --verbose

app = new_app("vectorclm", "From raw text to an evaluated, instruction-tuned language model.")
stages = new_app("stage", "Build one stage of an experiment alone, without Prefect and MLflow.")
add_stages(stages, STAGES, "vectorclm stage")
stores = new_app("store", "List and verify a store, remove leftovers, models and experiments, create a store.")
stores.update(store_app)
stores.command(remove_from_store, name="rm", help_epilogue="Example: vectorclm store rm tiny --yes")
app.command(stages)
app.command(stores)
app.command(bench_app)
app.command(schedule_app)
app.update(models)
app.update(planners)
app.command(chaos, help_epilogue="Example: vectorclm chaos --store ./store --minutes 10")
app.command(init, help_epilogue="Example: vectorclm init --text books/ --minutes 30")
app.register_install_completion_command()


@Parameter(name="*")
@dataclass(frozen=True)
class RunOptions:
    """How `vectorclm run` runs a curriculum and prints its results."""

    place: Place = Place()
    settings: Setting = ()
    json: Annotated[bool, Parameter(help="Print the results as one JSON object, and nothing else")] = False
    dry_run: Annotated[bool, Parameter(help="Print fingerprints and costs, and do nothing")] = False
    verbose: Annotated[bool, Parameter(help="Show every log line, and every table of the results")] = False
    on_platform: Annotated[bool, Parameter(help="Start it on the platform of the store, as its form does")] = False


@app.command(name="run", help_epilogue="Example: vectorclm run tiny --set finetune.epochs=2.0")
def run_experiment(
    experiment: Annotated[
        str | None,
        Parameter(help="tiny, small, base, or a TOML file [default: the one in this folder, or else tiny]"),
    ] = None,
    /,
    *,
    options: RunOptions = RunOptions(),
    machine: Annotated[
        Runtime, Parameter(name="*", group="This machine (never part of a result's fingerprint)")
    ] = Runtime(),
) -> None:
    """Run a whole experiment: text in, an evaluated chat model out."""
    refuse_without_torchrun()
    known = load_runtime(options.place.runtime).model_dump() | machine.model_dump(include=machine.model_fields_set)
    _run(experiment or experiment_here() or "tiny", validate(Runtime, known, "options"), options)


@app.command(help_epilogue="Example: vectorclm up --store ./store")
def up(
    *,
    platform: PlatformOptions = PlatformOptions(),
    install: Annotated[bool, Parameter(help="Start it at each boot, too, by a systemd unit")] = False,
) -> None:
    """Start the platform: Prefect server, MLflow, workers, deployments with run forms."""
    from flows.platform import autostart
    from flows.platform import doctor as parts

    config, console = platform.config(), Console()
    if install:
        autostart.install(config, platform, console)
    with parts.alone(config, console, starts=True):
        parts.up(config, console)


@app.command(help_epilogue="Example: vectorclm down")
def down(
    *,
    platform: PlatformOptions = PlatformOptions(),
    uninstall: Annotated[bool, Parameter(help="Remove the systemd unit of `up --install`, too")] = False,
) -> None:
    """Stop the platform; `vectorclm up` goes on from there."""
    from flows.platform import autostart
    from flows.platform import doctor as parts

    config, console = platform.config(), Console()
    if uninstall:
        autostart.uninstall(config, console)
    with parts.alone(config, console, starts=False):
        parts.down(config, console)


@app.command(help_epilogue="Example: vectorclm doctor")
def doctor(
    *,
    platform: PlatformOptions = PlatformOptions(),
    security: Annotated[bool, Parameter(help="Say instead what is open to others, and change nothing")] = False,
) -> int:
    """Check every part of the platform and repair it where possible; exit code 1 if a problem is left."""
    from flows.platform import doctor as parts

    config, console = platform.config(), Console()
    if security:
        from flows.platform import security_checks

        return 0 if security_checks.security(config, platform.env_file, console) else 1
    with parts.alone(config, console, starts=False):
        return 0 if parts.doctor(config, console) else 1


@app.command(help_epilogue="Example: vectorclm retry RUN --set finetune.epochs=2.0")
def retry(
    run: Annotated[str, Parameter(help="The run's id, or its name for the newest of that name")],
    /,
    *,
    platform: PlatformOptions = PlatformOptions(),
    again_from: Annotated[
        StageName | None, Parameter(name="--from", help="Rebuild this stage and those that follow, and compare them")
    ] = None,
    settings: Setting = (),
) -> None:
    """Run a curriculum again with other settings, or rebuild finished stages and compare them."""
    from flows.platform.prefect_server import platform_server

    with platform_server(platform.config(), is_named=platform.is_given) as page:
        from flows.platform.retry import retry as start

        new = start(run, again_from, list(settings))
    print(f"{new.before} runs again as a new run: {page}/runs/flow-run/{new.run_id}")


@app.command(help_epilogue="Example: vectorclm promote --task hellaswag")
def promote(
    model: Annotated[
        str, Parameter(help=f"A registered model: {NAMES.partition(' [')[0]}")
    ] = "models:/vectorclm-chat@candidate",
    /,
    *,
    place: StoreOptions = StoreOptions(),
    task: Annotated[
        tuple[str, ...],
        Parameter(
            show_default=False,
            help="A score that must improve, such as hellaswag or bits_per_byte.stories; may be repeated",
        ),
    ] = (),
) -> int:
    """Make a registered model the champion if it beats the present champion by more than the noise."""
    from flows.tracking.promotion import promote as move_alias

    return move_alias(model, list(task), existing_store(place.store), Console())


@app.command(name="lineage", help_epilogue="Example: vectorclm lineage MODEL --verify")
def show_lineage(
    model: Annotated[str | None, Parameter(help=NAMES)] = None,
    /,
    *,
    place: StoreOptions = StoreOptions(),
    verify: Annotated[bool, Parameter(help="Hash every file again; exit code 1 if one differs")] = False,
    diff: Annotated[str | None, Parameter(help="Print the differences from this model, setting by setting")] = None,
    uses: Annotated[str | None, Parameter(help="Print the models trained on a source: label, path, revision")] = None,
    json: Json = False,
) -> int:
    """Print the lineage of a model, back to its sources; or the models that were trained on a source."""
    found = existing_store(place.store)
    if uses is not None:
        return lineage_cli.print_users(uses, model, found, as_json=json)
    return lineage_cli.print_lineage(lookup.named_model(model, found), found, verify=verify, diff=diff, as_json=json)


@app.command(name="report", help_epilogue="Example: vectorclm report MODEL --out report.html")
def show_report(
    model: Annotated[str | None, Parameter(help=NAMES)] = None,
    /,
    *,
    place: StoreOptions = StoreOptions(),
    against: Annotated[str | None, Parameter(help="A model to compare with, such as the champion")] = None,
    out: Annotated[Path, Parameter(help="The file to write")] = Path("report.html"),
    show: Annotated[bool, Parameter(name="--open", help="Open the page in a browser")] = False,
) -> None:
    """Write the report of a model as one HTML page: curves, scores, samples, data, lineage, costs."""
    from flows.reports.report import write_report

    found = existing_store(place.store)
    write_report(lookup.named_model(model, found), found, against, out)
    if show and not webbrowser.open(out.absolute().as_uri()):
        print(f"no browser was found: open {out.absolute()} in one", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (see `vectorclm.command_line`)."""
    gc.freeze()  # imported modules stay, so the garbage collector need not scan them
    arguments = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds the stack, so that children and servers end
    try:
        if arguments and arguments[0] in ALONE:
            raise ConfigError(f"stages are commands of `vectorclm stage`: run vectorclm stage {' '.join(arguments)}")
        command, bound = parse(app, arguments, _environment_of)
    except VectorCLMError as error:
        explain(error)
        return 2
    code = run(lambda: _called(command, bound))
    if code == 130 and command is run_experiment:
        print("stopped: finished work is kept, and the same command continues from here", file=sys.stderr)
    return code


def _environment_of(env_file: Path) -> dict[str, str]:
    """The environment of commands about the store and the models of a platform; its MLflow is named while it runs."""
    from flows.platform.config import read_platform

    config = read_platform(env_file)
    _, mlflow = config.servers()
    other = ["PREFECT_", *([] if mlflow.holds_its_port() else ["MLFLOW_"])]
    other += ["VECTORCLM_HOME"] if config.vectorclm_home is None else []
    return {name: value for name, value in config.client_environment().items() if not name.startswith(tuple(other))}


def _called(command: Callable[..., Any], bound: BoundArguments) -> Any:
    """Call a command; for commands about models, replace the name of a registered model by its folder."""
    if command not in MODEL_COMMANDS:
        return command(*bound.args, **bound.kwargs)
    store = _store_of(bound)
    if not _names_a_model(command, bound):
        return command(*bound.args, **bound.kwargs)
    for name in ("before", "after") if command is compare else (next(iter(bound.signature.parameters)),):
        value = bound.arguments.get(name)
        if command is serve and value and not is_place(value):
            options = bound.arguments.get("options", ServeOptions())
            bound.arguments["options"] = replace(options, name=options.name or value.removeprefix(REGISTERED))
        if command is chat and value and not is_place(value):
            bound.arguments["options"] = replace(bound.arguments.get("options", ChatOptions()), title=value)
        if value and value.startswith(REGISTERED):
            bound.arguments[name] = lookup.named_model(value, Store(store))
        elif value and not is_place(value):
            with suppress(UnknownModelError, StoreError):  # the command checks its options, and then raises the same
                bound.arguments[name] = lookup.named_model(value, Store(store))
    found = command(*bound.args, **bound.kwargs)
    if isinstance(found, Artifact):
        _record(bound.args[0].rstrip("/"), found, Store(store))
    return None


def _store_of(bound: BoundArguments) -> str:
    options = bound.arguments.get("options")
    place = getattr(options, "place", options)
    return str(bound.arguments.get("store") or getattr(place, "store", None) or default_store())


def _names_a_model(command: Callable[..., Any], bound: BoundArguments) -> bool:
    """Whether the first argument is a model, and not an experiment."""
    scored, file = bound.arguments.get("scored"), bound.arguments.get("file")
    if command is evaluate:
        return scored is not None and bool(scored.suite or scored.text)
    return command is not export or (file is not None and file.format is not None)


def _record(address: str, scores: Artifact, store: Store) -> None:
    """Record the scores of a registered model in MLflow, if there is an MLflow."""
    if not lookup.has_record(store):
        return
    from flows.tracking.registry import Registry, RegistryError

    try:
        page = Registry(store).record_cli_evaluation(address, scores)
    except RegistryError as error:
        print(f"warning: {error}; the result is in the store and not in MLflow", file=sys.stderr)
    else:
        if page is not None:
            print(f"recorded in MLflow: {page}", file=sys.stderr)


def _run(named: str, runtime: Runtime, options: RunOptions) -> None:
    if options.on_platform:
        from flows.platform.submit import submit

        print(submit(named, options.place, options.settings, runtime, dry_run=options.dry_run))
        return
    (experiment, path), place = chosen(named, options.settings), options.place
    store = Store(place.store)
    runtime.check()
    if options.dry_run:
        _dry_run(experiment, path, store, runtime, options)
        return
    if runtime.placement == "pools" and not has_own_server():
        raise ConfigError("placement pools needs a Prefect server with workers: set PREFECT_API_URL, or use inline")
    store.check_writable()
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "INFO" if options.verbose else "CRITICAL")
    with interruptible(), prefect_server(local_folder(store) / ".prefect") as server:  # starts while sources are pinned
        console = Console(stderr=True)
        with console.status("checking the sources"):
            experiment, notes = pin(experiment, path, place.data, resolve=True)
            check_sources(experiment, place.data, hub=True)
        for note in notes:
            console.print(note, style="yellow", highlight=False)
        handles = _curriculum(experiment, runtime, store, options, console, server)
    from flows.reports.summary import Summary, as_line

    summary = Summary(experiment, store, handles)
    if options.json:
        print(as_line(summary))
    else:
        summary.show(Console(), details=options.verbose)


def _dry_run(experiment: ExperimentConfig, path: Path, store: Store, runtime: Runtime, options: RunOptions) -> None:
    from flows.reports.cost_estimate import budget, known_windows, machine_costs, reused, show
    from vectorclm.draft.estimate import estimate

    pinned, notes = pin(experiment, path, options.place.data, resolve=False)
    specs = plans(pinned)
    costs = budget(pinned, specs, known_windows(store, specs["shards"]))
    there = reused(store, specs, costs["stages"])
    costs["here"] = machine_costs(estimate(pinned, options.place.data, runtime), runtime, there)
    if options.json:
        print(json.dumps(costs))
        return
    sys.stderr.writelines(f"{note}\n" for note in notes)
    show(pinned, costs, Console())


def _curriculum(
    experiment: ExperimentConfig,
    runtime: Runtime,
    store: Store,
    options: RunOptions,
    console: Console,
    server: PrivateServer | None,
) -> dict[str, Any]:
    """Run the flow on the user's Prefect server or the private one, with progress on standard error."""
    with console.status("starting Prefect"):
        from prefect import tags

        from flows.curriculum import curriculum

        if server is not None:
            server.wait()
    with ExitStack() as stack:
        stack.callback(flush_logs)  # before the server stops
        stack.enter_context(bars(console) if console.is_terminal else attached(ProgressLines(console), PROGRESS))
        if not options.verbose:
            stack.enter_context(attached(LogLines(console), LOG_LEVELS))
        place = str(data.absolute()) if (data := options.place.data) is not None else None
        name, its_tags = of_the_command_line(experiment.name, assignments(options.settings))
        stack.enter_context(tags(*its_tags))
        stack.enter_context(parameters_fit())
        return curriculum.with_options(flow_run_name=name)(experiment, runtime, store.uri, place)


if __name__ == "__main__":
    sys.exit(main())
