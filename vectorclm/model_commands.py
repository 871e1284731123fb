"""Commands about models: evaluate, export, compare, chat and serve.

A command imports what it runs, because torch takes seconds to import.
"""

import json
import re
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field

from vectorclm.command_line import LOCAL_STORE, Json, StoreUri, new_app
from vectorclm.comparison.config import Limits
from vectorclm.config import Suite, load_suite
from vectorclm.errors import ConfigError, DataError
from vectorclm.inference.config import SamplingParams
from vectorclm.lineage.pinning import pin, pin_suite
from vectorclm.runtime import progress
from vectorclm.runtime.devices import Runtime
from vectorclm.stage_commands import StageOptions, build_stage, chosen, load_runtime
from vectorclm.store.artifact import Artifact, Store
from vectorclm.store.model_names import NAMES, existing_store, is_place, resolve_model
from vectorclm.store.model_ref import find_model

models = new_app("models", "Models: score, export, compare, chat, serve.")


@Parameter(name="*")
@dataclass(frozen=True)
class ScoreOptions:
    """Options for the text or the suite that a model is scored on."""

    text: Annotated[Path | None, Parameter(help="Score the model, or a GGUF file, on this UTF-8 text")] = None
    suite: Annotated[
        str | None,
        Parameter(
            help="Score the model on this suite (standard, generation, a file), or on an experiment's evaluation"
        ),
    ] = None
    every_checkpoint: Annotated[
        bool, Parameter(help="Score the kept checkpoints of an experiment's trainings, and write the curves")
    ] = False
    allow_unsandboxed: Annotated[
        bool, Parameter(help="Run the programs that the model writes even where the system offers no sandbox")
    ] = False
    json: Json = False


@Parameter(name="*")
@dataclass(frozen=True)
class FileOptions:
    """Options for a GGUF file for llama.cpp."""

    format: Annotated[Literal["gguf"] | None, Parameter(help="Write a model as one GGUF file for llama.cpp")] = None
    type: Annotated[
        Literal["f32", "f16", "q8_0"] | None, Parameter(help="Number format of the matrices in the file [default: f16]")
    ] = None
    out: Annotated[Path | None, Parameter(help="Output file [default: vectorclm-SIZE-KIND-HASH-TYPE.gguf]")] = None


class ChatSampling(SamplingParams):
    """Sampling parameters of a chat, with a chat's defaults."""

    temperature: float = Field(default=0.7, ge=0, le=100, description="0 always takes the most likely token")
    top_p: float = Field(
        default=0.95, gt=0, le=1, description="Sample from the most likely tokens that have this probability together"
    )


@Parameter(name="*")
@dataclass(frozen=True)
class ChatOptions:
    """Options for a conversation in the terminal."""

    store: StoreUri = LOCAL_STORE
    runtime: Annotated[Path | None, Parameter(help="TOML or JSON file with settings of this machine")] = None
    system: Annotated[str, Parameter(help="System prompt")] = ""
    stop: Annotated[tuple[str, ...], Parameter(show_default=False, help="End before this text; may be repeated")] = ()
    max_new_tokens: Annotated[int, Parameter(help="Longest answer, in tokens")] = 256
    title: Annotated[str | None, Parameter(parse=False)] = None  # the model's name as it was typed


@Parameter(name="*")
@dataclass(frozen=True)
class ServeOptions:
    """Options for the address of a server."""

    store: StoreUri = LOCAL_STORE
    runtime: Annotated[Path | None, Parameter(help="TOML or JSON file with settings of this machine")] = None
    host: Annotated[str, Parameter(help="Address to listen on")] = "127.0.0.1"
    port: Annotated[int, Parameter(help="0 takes a free port")] = 8000
    name: Annotated[str | None, Parameter(help="Name of the model in the API [default: the last part of MODEL]")] = None
    cors: Annotated[
        tuple[str, ...],
        Parameter(show_default=False, help="Origin of web pages that may use the API, or *; may be repeated"),
    ] = ()
    parallel: Annotated[
        int | None,
        Parameter(help="Answers that are generated at once [default: 16, or as many as fit in 1 GiB of cache]"),
    ] = None


@models.command(help_epilogue="Example: vectorclm evaluate MODEL --suite standard --data DIR --items 1000")
def evaluate(
    target: Annotated[
        str | None, Parameter(name="MODEL", help=f"{NAMES}; without --text and --suite, an experiment's file or name")
    ] = None,
    /,
    *,
    options: StageOptions = StageOptions(),
    scored: ScoreOptions = ScoreOptions(),
    limits: Annotated[Limits, Parameter(name="*", group="Limits of a suite")] = Limits(),
) -> Artifact | None:
    """Score a model on a text (--text) or on a suite (--suite), or an experiment's chat model as its stage does."""
    takes_model = bool(scored.suite or scored.text) and not scored.every_checkpoint
    if takes_model:
        _refuse_settings(target, options)
    model = model_or_experiment(target, options.place.store, takes_model=takes_model)
    if scored.every_checkpoint:
        measure_curves(model, options, scored, limits)
    elif scored.suite is not None:
        if scored.text is not None:
            raise ConfigError("--text and --suite exclude each other: give one of them")
        return measure_model(model, options, scored, limits)
    elif limits.model_fields_set:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(limits.model_fields_set))
        raise ConfigError(f"{names} need --suite NAME")
    elif scored.text is not None:
        score_text(model, scored.text, as_json=scored.json)
    else:
        _build_of_experiment("evaluate", model, options, "--text FILE to score it on a text, or --suite NAME")
    return None


@models.command(help_epilogue="Example: vectorclm export MODEL --format gguf --type q8_0")
def export(
    target: Annotated[
        str | None, Parameter(name="MODEL", help=f"{NAMES}; without --format, an experiment's file or name")
    ] = None,
    /,
    *,
    options: StageOptions = StageOptions(),
    file: FileOptions = FileOptions(),
) -> None:
    """Write a model as one GGUF file (--format), or an experiment's models as Hugging Face directories."""
    if file.format is not None:
        _refuse_settings(target, options)
    model = model_or_experiment(target, options.place.store, takes_model=file.format is not None)
    if file.format is not None:
        from vectorclm.export.gguf import export_gguf

        path = export_gguf(find_model(model), file.type or "f16", file.out)
        print(f"{path}: {path.stat().st_size:,} bytes")
    elif file.type or file.out:
        raise ConfigError("--type and --out need --format gguf")
    else:
        _build_of_experiment("export", model, options, "--format gguf")


def model_or_experiment(target: str | None, store: str, *, takes_model: bool) -> str:
    """The address of the model that is named, or the name of an experiment. Raises ConfigError where it is missing."""
    if takes_model:
        return resolve_model(target, store)
    if target is None:
        raise ConfigError("name an experiment, or add an option that takes a model; --help lists them")
    return target


def _build_of_experiment(stage: str, target: str, options: StageOptions, missing: str) -> None:
    if Path(target).is_dir():
        raise ConfigError(f"{target} is a model: add {missing}")
    build_stage(stage, target, options)


def _refuse_settings(target: str | None, options: StageOptions) -> None:
    if options.settings:
        raise ConfigError(f"--set changes an experiment, and {target or 'the newest'} is a model here: leave it out")


@models.command(help_epilogue="Example: vectorclm compare A B --suite standard")
def compare(
    before: Annotated[str, Parameter(name="A", help=NAMES.partition(" [")[0])],
    after: Annotated[str, Parameter(name="B", help="The same")],
    /,
    *,
    store: StoreUri = LOCAL_STORE,
    suite: Annotated[
        str | None, Parameter(help="Suite that both models were scored on [default: the one with the most items]")
    ] = None,
    json: Json = False,
) -> None:
    """Compare two models on the same items: differences, their 95 % intervals, and which are beyond noise."""
    from vectorclm.comparison.compare import print_comparison

    first, second = (resolve_model(name, store) for name in (before, after))
    print_comparison(first, second, existing_store(store), suite, as_json=json)


@models.command(help_epilogue="Example: vectorclm chat MODEL --temperature 0.5")
def chat(
    model: Annotated[str | None, Parameter(help=f"A chat model: {NAMES}")] = None,
    /,
    *,
    options: ChatOptions = ChatOptions(),
    sampling: Annotated[ChatSampling, Parameter(name="*", group="SamplingParams")] = ChatSampling(),
) -> None:
    """Talk to a model in the terminal."""
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be 1 or more, not {options.max_new_tokens}")
    if "" in options.stop:
        raise ConfigError("--stop must not be empty: an empty text would end every answer at once")
    address, runtime = resolve_model(model, options.store), load_runtime(options.runtime)
    from vectorclm.inference.chat import Conversation, open_chat_model, talk

    chat_model = open_chat_model(address, runtime)
    place = re.sub(r"^.*/([\w-]+/)([0-9a-f]{12})[0-9a-f]*$", r"\1\2", address.rstrip("/"))
    named = options.title or (model if model and not is_place(model) else None)
    title = f"{named} ({place})" if named and not place.startswith(named) else place
    talk(Conversation(chat_model, options.max_new_tokens, options.system), sampling, options.stop, title)


@models.command(help_epilogue="Example: VECTORCLM_API_KEY=… vectorclm serve MODEL --port 8000")
def serve(
    model: Annotated[str | None, Parameter(help=f"A chat model: {NAMES}")] = None,
    /,
    *,
    options: ServeOptions = ServeOptions(),
) -> None:
    """Serve a model over OpenAI's API, with a chat page."""
    from vectorclm.inference.serve import ServerAddress
    from vectorclm.inference.serve import serve as start_server

    address = resolve_model(model, options.store)
    name = options.name or (model if model and not is_place(model) else None)
    if options.parallel is not None and options.parallel < 1:
        raise ConfigError(f"--parallel must be 1 or more, not {options.parallel}")
    place = ServerAddress(options.host, options.port, options.cors)
    start_server(address, load_runtime(options.runtime), place, name, options.parallel)


def _text_scores(address: str, text: str) -> dict[str, float]:
    """Bits per byte of a text; a model folder and a GGUF file of the same model have the same figure."""
    if address.endswith(".gguf"):
        from vectorclm.export.llama_cpp import LlamaCpp

        return LlamaCpp(Path(address)).text_scores(text)
    from vectorclm.evaluation.bits_per_byte import comparable_length, text_scores
    from vectorclm.inference.load import open_model

    folder, device = find_model(address).local(), Runtime().configure_torch()
    model, tokenizer = open_model(folder, address)
    length = comparable_length(model.config.max_position_embeddings)
    return text_scores(model.to(device), tokenizer, text, device, length, shown=True)


def score_text(address: str, file: Path, *, as_json: bool) -> None:
    """Print the bits per byte of a model on a text; llama.cpp scores a GGUF file."""
    try:
        text = file.read_bytes().decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: byte {error.start} cannot be read; convert the file first") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    with progress.bars():
        scores = _text_scores(address, text)
    if as_json:
        print(json.dumps(scores))
    else:
        print(
            f"{scores['bits_per_byte']:.4f} bits per byte, {scores['nats_per_token']:.4f} nats per token",
            end=" ",
        )
        print(f"({scores['bytes']:,} bytes, {scores['tokens']:,} tokens)")


def _scoring_runtime(options: StageOptions, scored: ScoreOptions) -> Runtime:
    """The runtime settings, with the option --allow-unsandboxed applied."""
    runtime = load_runtime(options.place.runtime)
    runtime.check()
    return runtime.model_copy(update={"allow_unsandboxed": True}) if scored.allow_unsandboxed else runtime


def measure_model(address: str, options: StageOptions, scored: ScoreOptions, limits: Limits) -> Artifact:
    """Score a model on a suite, or reuse finished scores; print them and return their artifact."""
    from vectorclm.comparison.measurement import left_out, measure, measure_plan, not_run
    from vectorclm.evaluation.statistics import figures

    place, relay = options.place, options.relay
    model = find_model(address)
    suite, path = load_suite(scored.suite or "")
    store, runtime = Store(place.store), _scoring_runtime(options, scored)
    if not relay:
        store.check_writable()
        suite, notes = pin_suite(suite, path, place.data)
        spec = measure_plan(suite, limits, model, store, runtime)
        for note in [*notes, *left_out(spec, suite, limits, runtime)]:
            print(note, file=sys.stderr)
    show: AbstractContextManager[None] = progress.json_lines() if relay else progress.bars()
    with show:
        artifact, reused = measure(suite, limits, model, store, runtime, place.data)
    state, refused = "reused" if reused else "built", not_run(suite, limits, runtime)
    if scored.json:
        found = {"state": state, "uri": artifact.uri, "scores": artifact.summary}
        print(json.dumps({**found, **({"not_run": refused} if refused else {})}))
    elif not relay:
        for name, figure in figures(artifact.summary).items():
            print(f"{name:<24} {figure.value:.4f} ± {figure.stderr:.4f}{_about(artifact.summary, name)}")
        for label in refused:
            print(f"{f'acc.{label}':<24} not run")
        print(f"measure {state}: {artifact.uri}")
    return artifact


def _about(scores: Mapping[str, Any], name: str) -> str:
    """Details of a task's score: acc_norm, chance, items, contaminated items."""
    task = scores["tasks"].get(name.removeprefix("acc."))
    if task is None:
        return ""
    normed = ""
    if "acc_norm" in task:
        from vectorclm.evaluation.statistics import share_error

        normed = f", acc_norm {task['acc_norm']:.4f} ± {share_error(task['acc_norm'], task['items']):.4f}"
    repeated = f", {task['contaminated']:,} repeated in training" if "contaminated" in task else ""
    return f"{normed}, chance {task['chance']:.3f}, {task['items']:,} items{repeated}"


def measure_curves(named: str, options: StageOptions, scored: ScoreOptions, limits: Limits) -> None:
    """Score the checkpoints of an experiment's trainings on a suite (default: its own), and write the curves."""
    from vectorclm.comparison.curves import measure_checkpoints, write_curves
    from vectorclm.comparison.measurement import not_run
    from vectorclm.evaluation.statistics import figures

    place = options.place
    store, runtime = Store(place.store), _scoring_runtime(options, scored)
    store.check_writable()
    experiment, path = chosen(named, options.settings)
    experiment, notes = pin(experiment, path, place.data, resolve=True)
    suite = Suite.of(experiment)
    if scored.suite is not None:
        suite, others = pin_suite(*load_suite(scored.suite), place.data)
        notes += others
    for note in [*notes, *(f"{label} not run: {why}" for label, why in not_run(suite, limits, runtime).items())]:
        print(note, file=sys.stderr)
    measured = []
    with progress.bars():
        for point, result in measure_checkpoints(experiment, suite, limits, store, runtime, place.data):
            measured.append((point, result))
    uri = write_curves(measured, suite, store)
    if scored.json:
        print(json.dumps({"uri": uri, "points": [(point.stage, point.step, result.uri) for point, result in measured]}))
        return
    for point, result in measured:
        found = "  ".join(f"{name} {figure.value:.4f}" for name, figure in figures(result.summary).items())
        print(f"{point.stage} {point.step:>6}  {found}")
    print(f"curves: {uri}")
