"""`python -m vectorclm STAGE EXPERIMENT`: each stage alone, a model on a text, a chat, a server: the core by itself."""

import argparse
import gc
import json
import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vectorclm import progress
from vectorclm.addresses import find_model
from vectorclm.artifact import Artifact, Store, default_store
from vectorclm.bits_per_byte import text_scores
from vectorclm.chat import Conversation, open_chat_model, talk
from vectorclm.command_line import CommandParser
from vectorclm.compare import add_compare_command, run_compare_command
from vectorclm.config import ExperimentConfig, load_experiment, override, read_config
from vectorclm.curves import measure_checkpoints, write_curves
from vectorclm.distributed import Group, end_together, joined, record
from vectorclm.errors import ConfigError, DataError, PreemptedError, VectorCLMError
from vectorclm.evaluate import open_model
from vectorclm.generate import Sampling
from vectorclm.gguf_export import GGUF_TYPES, export_gguf
from vectorclm.housekeeping import add_store_command, run_store_command
from vectorclm.llama_cpp import LlamaCpp
from vectorclm.measure import Limits, figures, left_out, measure, measure_plan, not_run
from vectorclm.pinning import pin, pin_suite
from vectorclm.preemption import ENDED, PREEMPTED
from vectorclm.runtime import Runtime
from vectorclm.settings import validate
from vectorclm.stages import STAGES, TRAININGS, follow_stage, run_stage, told
from vectorclm.suite import Suite, load_suite

ABOUT = {
    "sample": "draw the documents and write them as Parquet",
    "tokenizer": "learn the byte-level BPE",
    "shards": "tokenize the documents into windows",
    "chat_shards": "render and pack the conversations",
    "pretrain": "train the base model over the curriculum",
    "evaluate_base": "score the base model",
    "finetune": "tune the base model on the conversations",
    "evaluate": "score the chat model; or any model, on any text (--text) or on a suite (--suite)",
    "export": "write the models as Hugging Face directories with their cards; or any model as one file (--format)",
}

CHAT_SAMPLING = {"temperature": 0.7, "top_p": 0.95}  # of a chat in the terminal, unless options say otherwise

STOPPING = (
    f"SIGTERM ends it after a checkpoint, with exit code {PREEMPTED}, and the same command goes on from there; "
    "a second SIGTERM ends it at once."
)

OF_MODELS = ("evaluate", "export")  # commands that take any model in place of an experiment


def add_place(parser: argparse.ArgumentParser, *, data: bool = True) -> None:
    """The options that say where artifacts and sources are."""
    default = default_store()
    parser.add_argument("--store", default=default, metavar="URI", help="where artifacts are kept (%(default)s)")
    if data:
        parser.add_argument("--data", type=Path, metavar="DIR", help="read every source from this local mirror")
    parser.add_argument("--runtime", type=Path, metavar="FILE", help="TOML or JSON with settings of this machine")


def add_commands(commands: Any, models: str = "a folder or <store>/<stage>/<fingerprint>") -> None:
    """Add the core's commands to the subparsers of a command line, which finds `models` in these places."""
    for stage in STAGES:
        about = f"{ABOUT[stage]}. {STOPPING}" if stage in TRAININGS else None
        parser = commands.add_parser(stage, help=ABOUT[stage], description=about)
        what = "experiment (tiny, small, base, or a TOML file)" + (" or model" if stage in OF_MODELS else "")
        parser.add_argument("target", metavar="EXPERIMENT", help=what)
        add_place(parser)
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="change a setting of the experiment, as `run`",
        )
        parser.add_argument(
            "--relay",
            action="store_true",
            help="report progress and errors as JSON lines to a parent process",
        )
        parser.add_argument(
            "--again", action="store_true", help="make a finished stage once more beside its artifact, and compare"
        )
        if stage == "evaluate":
            parser.add_argument(
                "--text",
                type=Path,
                metavar="FILE",
                help=f"score the model EXPERIMENT, {models} or a GGUF file, on this UTF-8 text",
            )
            parser.add_argument(
                "--suite",
                metavar="NAME",
                help=f"score the model EXPERIMENT, {models}, on this suite, or as this experiment does",
            )
            parser.add_argument(
                "--every-checkpoint",
                action="store_true",
                help="score what an experiment's trainings kept (keep_checkpoints in --runtime), and write the curves",
            )
            for name, field in Limits.model_fields.items():
                option, about = f"--{name.replace('_', '-')}", f"of a suite: {field.description}"
                if isinstance(field.default, bool):
                    parser.add_argument(option, action="store_true", default=None, help=about)
                else:
                    parser.add_argument(option, type=int, metavar="N", help=f"{about} ({field.default})")
            about = f"as allow_unsandboxed in --runtime: {Runtime.model_fields['allow_unsandboxed'].description}"
            parser.add_argument("--allow-unsandboxed", action="store_true", help=about)
            parser.add_argument("--json", action="store_true", help="print one JSON object")
        if stage == "export":
            about = f"write the model EXPERIMENT, {models}, as one GGUF file for llama.cpp"
            parser.add_argument("--format", choices=["gguf"], help=about)
            parser.add_argument("--type", choices=GGUF_TYPES, help="how the file stores matrices (f16)")
            parser.add_argument("--out", type=Path, metavar="FILE", help="the file (vectorclm-SIZE-KIND-TYPE.gguf)")
    add_store_command(commands)
    add_compare_command(commands, models)
    parser = commands.add_parser("chat", help="talk to a model in the terminal")
    add_model(parser, models)
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt (none)")
    for name, field in Sampling.model_fields.items():
        option, kind = f"--{name.replace('_', '-')}", int if name in ("top_k", "seed") else float
        default = CHAT_SAMPLING.get(name, field.default)
        about = f"{field.description} ({'%(default)s' if default is not None else 'none'})"
        parser.add_argument(option, type=kind, default=default, metavar="N", help=about)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (%(default)s)")
    parser = commands.add_parser("serve", help="serve a model as OpenAI's API does, with a page that chats")
    add_model(parser, models)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (%(default)s)")
    parser.add_argument("--name", help="what the API calls the model (the last part of MODEL)")


def add_model(parser: argparse.ArgumentParser, models: str) -> None:
    """The model to talk to, which is in one of these places, and this machine's settings."""
    parser.add_argument("target", metavar="MODEL", help=f"chat model: {models}")
    add_place(parser, data=False)


def chosen(args: argparse.Namespace) -> tuple[ExperimentConfig, Path]:
    """The experiment that the command line names, with the settings that it changes, and its file."""
    experiment, path = load_experiment(args.target)
    return override(experiment, args.set), path


def load_runtime(path: Path | None) -> Runtime:
    """The runtime settings in a file, or the defaults."""
    return Runtime() if path is None else validate(Runtime, read_config(path), str(path))


def run_command(args: argparse.Namespace) -> int:
    """Run one of the core's commands; 1 where it found what should not be.

    Raises VectorCLMError with what to do where it cannot run.
    """
    if args.command == "store":
        return run_store_command(args)
    if args.command == "compare":
        return run_compare_command(args)
    if args.command == "chat":
        start_chat(args)
    elif args.command == "serve":
        from vectorclm.serve import serve

        serve(args.target, load_runtime(args.runtime), args.host, args.port, args.name)
    elif (
        args.set
        and any(getattr(args, name, None) for name in ("suite", "text", "format"))
        and not (getattr(args, "every_checkpoint", False))
    ):
        raise ConfigError(f"--set changes an experiment, and {args.target} is a model here: leave it out")
    elif args.command == "export" and args.format is not None:
        path = export_gguf(find_model(args.target), args.type or "f16", args.out)
        print(f"{path}: {path.stat().st_size:,} bytes")
    elif args.command == "export" and (args.type or args.out):
        raise ConfigError("--type and --out need --format gguf")
    elif args.command == "evaluate" and args.every_checkpoint:
        measure_curves(args)
    elif args.command == "evaluate" and args.suite is not None:
        measure_model(args)
    elif args.command == "evaluate" and limits_given(args):
        raise ConfigError(f"--{', --'.join(limits_given(args)).replace('_', '-')} need --suite NAME")
    elif args.command == "evaluate" and args.text is not None:
        score_text(args.target, args.text, as_json=args.json)
    else:
        make_stage(args)
    return 0


def start_chat(args: argparse.Namespace) -> None:
    """Talk to a model in the terminal."""
    sampling = validate(Sampling, {name: getattr(args, name) for name in Sampling.model_fields}, "options")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be 1 or more, not {args.max_new_tokens}")
    if "" in args.stop:
        raise ConfigError("--stop must not be empty: every text would end before it began")
    chat_model = open_chat_model(args.target, load_runtime(args.runtime))
    talk(Conversation(chat_model, args.max_new_tokens, args.system), sampling, args.stop)


def score_text(address: str, file: Path, *, as_json: bool) -> None:
    """Print the bits per byte of a model on a text; of a GGUF file, those of llama.cpp."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: byte {error.start} cannot be read; convert the file first") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if address.endswith(".gguf"):
        scores = LlamaCpp(Path(address)).text_scores(text)
    else:
        folder, device = find_model(address).local(), Runtime().configure_torch()
        model, tokenizer = open_model(folder, address)
        scores = text_scores(model.to(device), tokenizer, text, device)
    if as_json:
        print(json.dumps(scores))
    else:
        print(
            f"{scores['bits_per_byte']:.4f} bits per byte, {scores['nats_per_token']:.4f} nats per token",
            end=" ",
        )
        print(f"({scores['bytes']:,} bytes, {scores['tokens']:,} tokens)")


def limits_given(args: argparse.Namespace) -> dict[str, int]:
    """The limits of a suite that the command line sets."""
    return {name: getattr(args, name) for name in Limits.model_fields if getattr(args, name) is not None}


def measuring_runtime(args: argparse.Namespace) -> Runtime:
    """The runtime settings of a measurement, with the option that takes the risk of no sandbox."""
    runtime = load_runtime(args.runtime)
    runtime.check()
    return runtime.model_copy(update={"allow_unsandboxed": True}) if args.allow_unsandboxed else runtime


def measure_model(args: argparse.Namespace) -> Artifact:
    """Measure a model on a suite, or find it measured, and print its scores; the artifact with them."""
    if args.text is not None:
        raise ConfigError("--text and --suite ask for two things: give one of them")
    limits = validate(Limits, limits_given(args), "options")
    model = find_model(args.target)
    suite, path = load_suite(args.suite)
    store, runtime = Store(args.store), measuring_runtime(args)
    if not args.relay:
        store.check_writable()
        suite, notes = pin_suite(suite, path, args.data)
        plan = measure_plan(suite, limits, model, store, runtime)
        for note in [*notes, *left_out(plan, suite, limits, runtime)]:
            print(note, file=sys.stderr)
    show: AbstractContextManager[None] = progress.json_lines() if args.relay else progress.bars()
    with show:
        artifact, reused = measure(suite, limits, model, store, runtime, args.data)
    state, refused = "reused" if reused else "built", not_run(suite, limits, runtime)
    if args.json:
        found = {"state": state, "uri": artifact.uri, "scores": artifact.summary}
        print(json.dumps({**found, **({"not_run": refused} if refused else {})}))
    elif not args.relay:
        for name, figure in figures(artifact.summary).items():
            print(f"{name:<24} {figure.value:.4f} ± {figure.stderr:.4f}{_about(artifact.summary, name)}")
        for label in refused:
            print(f"{f'acc.{label}':<24} not run")
        print(f"measure {state}: {artifact.uri}")
    return artifact


def _about(scores: Mapping[str, Any], name: str) -> str:
    """What else is known of a task's score."""
    task = scores["tasks"].get(name.removeprefix("acc."))
    if task is None:
        return ""
    normed = f", acc_norm {task['acc_norm']:.4f} ± {task['stderr_norm']:.4f}" if "acc_norm" in task else ""
    repeated = f", {task['contaminated']:,} repeated in training" if "contaminated" in task else ""
    return f"{normed}, chance {task['chance']:.3f}, {task['items']:,} items{repeated}"


def measure_curves(args: argparse.Namespace) -> None:
    """Measure the checkpoints of an experiment's trainings on a suite, its own by default, and write the curves."""
    limits = validate(Limits, limits_given(args), "options")
    store, runtime = Store(args.store), measuring_runtime(args)
    store.check_writable()
    experiment, path = chosen(args)
    experiment, notes = pin(experiment, path, args.data, resolve=True)
    suite = Suite.of(experiment)
    if args.suite is not None:
        suite, others = pin_suite(*load_suite(args.suite), args.data)
        notes += others
    for note in [*notes, *(f"{label} not run: {why}" for label, why in not_run(suite, limits, runtime).items())]:
        print(note, file=sys.stderr)
    measured = []
    with progress.bars():
        for point, result in measure_checkpoints(experiment, suite, limits, store, runtime, args.data):
            measured.append((point, result))
    uri = write_curves(measured, suite, store)
    if args.json:
        print(json.dumps({"uri": uri, "points": [(point.stage, point.step, result.uri) for point, result in measured]}))
        return
    for point, result in measured:
        found = "  ".join(f"{name} {figure.value:.4f}" for name, figure in figures(result.summary).items())
        print(f"{point.stage} {point.step:>6}  {found}")
    print(f"curves: {uri}")


def make_stage(args: argparse.Namespace) -> None:
    """Make one stage's artifact and print where it is; under torchrun, together with the other ranks.

    A training that SIGTERM ends says so, and ends all ranks with exit code PREEMPTED.
    """
    if args.command in OF_MODELS and Path(args.target).is_dir():
        missing = {"evaluate": "--text FILE to score it on a text, or --suite NAME", "export": "--format gguf"}
        raise ConfigError(f"{args.target} is a model: add {missing[args.command]}")
    with joined() as group:
        if group.world_size > 1 and args.command not in TRAININGS:
            raise ConfigError(f"{args.command} runs in one process: start it without torchrun")
        store, runtime = Store(args.store), load_runtime(args.runtime)
        runtime.check(group)
        try:
            if group.rank:
                follow_stage(args.command, store, runtime, group)
            else:
                _lead_stage(args, store, runtime, group)
        except PreemptedError as error:
            record(error)
            if group.rank == 0:
                explain(error, relay=args.relay)
            end_together(group, PREEMPTED)


def _lead_stage(args: argparse.Namespace, store: Store, runtime: Runtime, group: Group) -> None:
    experiment, path = chosen(args)
    if not args.relay:  # a parent has done both before any stage began
        store.check_writable()
        experiment, notes = pin(experiment, path, args.data, resolve=True)
        for note in notes:
            print(note, file=sys.stderr)
    show: AbstractContextManager[None] = progress.json_lines() if args.relay else progress.bars()
    with show:
        logging.basicConfig(format="%(message)s", stream=sys.stderr)  # in here, above the bars
        logging.getLogger("vectorclm").setLevel(logging.INFO)
        artifact, reused = run_stage(args.command, experiment, store, runtime, args.data, again=args.again, group=group)
    if not args.relay:
        state = "made again, the same to the byte" if reused and args.again else "reused" if reused else "built"
        print(f"{args.command} {state}: {artifact.uri}")
        for line in told(args.command, artifact.summary):
            print(line)


def explain(error: VectorCLMError, *, relay: bool) -> None:
    """Tell an error to the person at the terminal; with `relay` to the process that started this one."""
    if relay:
        line = json.dumps({"error": {"type": type(error).__name__, "message": str(error)}})
        print(line + "\n", end="", flush=True)  # in one write, as ranks share the pipe
    else:
        print(f"error: {error}", file=sys.stderr)


def command_line() -> CommandParser:
    """The parser of `python -m vectorclm`, with all its commands."""
    parser = CommandParser("python -m vectorclm", description=__doc__)
    add_commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 where all went well, 1 where `store verify` did not, 2 for an error that is explained.

    A training that SIGTERM ends, once it has kept a checkpoint, exits with 75; any other stage with 143.
    """
    args = command_line().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))  # so that a lease is given back
    try:
        return run_command(args)
    except VectorCLMError as error:
        explain(error, relay=getattr(args, "relay", False))
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    gc.freeze()  # what is imported stays, so no collection of garbage need look at it
    sys.exit(main())
