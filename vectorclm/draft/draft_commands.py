"""`vectorclm init`: write an experiment that fits one's own text, this machine and the minutes.

The command imports what it runs: its help waits for neither torch nor Arrow.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from vectorclm.command_line import shell_line
from vectorclm.config import EXPERIMENTS, ExperimentConfig, load_experiment
from vectorclm.corpus.summary import drop_counts
from vectorclm.errors import ConfigError
from vectorclm.model_config import ModelConfig
from vectorclm.runtime.devices import Runtime

if TYPE_CHECKING:
    from vectorclm.draft.choice import Choice
    from vectorclm.draft.survey import TextSurvey


def init(
    name: Annotated[str | None, Parameter(help="Name of the experiment [default: that of the first text]")] = None,
    /,
    *,
    text: Annotated[
        tuple[str, ...],
        Parameter(consume_multiple=True, help="Files, folders, patterns, hub ids or s3://… with text; may be repeated"),
    ],
    chat: Annotated[
        tuple[str, ...],
        Parameter(consume_multiple=True, show_default=False, help="The same with conversations, for a chat model"),
    ] = (),
    minutes: Annotated[float, Parameter(help="Time for the training on this machine")] = 30.0,
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(help="Device to train on")] = "auto",
    threads: Annotated[int, Parameter(help="CPU threads of torch; 0 = the cores")] = 0,
) -> None:
    """Write an experiment for your own text: vocabulary, shape, budgets and splits fit the text and the minutes.

    Reads Parquet, JSON Lines, .txt and .md, also compressed.
    Many text files are a document each; few are split into documents at blank lines.
    `vectorclm run` in this folder then trains the model.
    """
    from vectorclm.draft.choice import choose
    from vectorclm.draft.experiment_file import SEED, experiment_file
    from vectorclm.draft.speed import training_speed
    from vectorclm.draft.survey import survey_chat, survey_text

    folder, console = Path.cwd(), Console(stderr=True)
    named = name or _name_of(text[0])
    path = folder / f"{named}.toml"
    if re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", named) is None or (EXPERIMENTS / path.name).exists():
        raise ConfigError(f"{named!r} cannot be the name: use small letters, digits and -, and no shipped experiment's")
    if path.exists():
        raise ConfigError(f"{path} exists: remove it, or give another name, as in vectorclm init mine --text …")
    runtime = Runtime(device=device, threads=threads)
    runtime.check()
    with console.status("reading the text"):
        texts = [survey_text(place, label, folder, SEED) for place, label in zip(text, _labels(text), strict=True)]
        chats = [survey_chat(place, f"chat-{number}", folder) for number, place in enumerate(chat, 1)]
    with console.status("measuring this machine"):

        def speed(model: ModelConfig, length: int) -> float:
            return training_speed(model, length, 16, runtime)

        choice = choose(texts, chats, minutes, speed)
    path.write_text(experiment_file(named, choice, folder), encoding="utf-8")
    experiment, _ = load_experiment(str(path))
    for line in explanation(choice, experiment):
        print(line)
    print(f"\nwrote {path.name}; next:")
    for options in (["--dry-run"], []):
        print(f"  {shell_line('vectorclm', 'run', path.name, *options)}")


def _name_of(place: str) -> str:
    stem = re.split(r"[/\\]", place.rstrip("/*"))[-1].partition(".")[0].lower()
    return re.sub(r"[^a-z0-9_-]+", "-", stem).strip("-_") or "mine"


def _labels(places: tuple[str, ...]) -> list[str]:
    """A label for each place: its name, with a number where names repeat."""
    names: list[str] = []
    for place in places:
        base = _name_of(place)
        names.append(base if base not in names else f"{base}-{len(names) + 1}")
    return names


def explanation(choice: "Choice", experiment: ExperimentConfig) -> list[str]:
    """What was found and chosen, and why, in lines of 80 columns."""
    from vectorclm.draft.choice import LEAST_STEPS

    lines = [line for text in choice.texts for line in _about_text(text)]
    for chat in choice.chats:
        lost = drop_counts(chat.dropped, {})
        lines.append(f"{chat.place}: {chat.conversations:,} conversations; dropped: {lost}")
    model = choice.model
    lines += [
        f"vocabulary {model.vocab_size:,}: {choice.bytes_per_token:.2f} bytes a token on this text",
        f"model of {model.parameters:,} parameters: the largest that text and minutes can train",
        f"windows of {choice.length} tokens; {choice.speed:,.0f} tokens a second measured here",
        f"pretraining: {choice.tokens:,} tokens, {choice.epochs:.1f} passes over the text, "
        f"about {choice.tokens / choice.speed / 60:.1f} minutes",
    ]
    if choice.tokens / choice.speed > choice.minutes * 60:
        lines.append(
            f"this is more than {choice.minutes:g} minutes, because fewer than {LEAST_STEPS} steps learn little"
        )
    if experiment.finetune is not None:
        seconds = choice.chat_epochs * choice.chat_tokens / choice.speed
        lines.append(f"fine-tuning: {choice.chat_epochs:g} passes, about {seconds / 60:.1f} minutes")
    lines.append(f"held out: {100 * choice.validation_share:.2g} % of the documents")
    return lines


def _about_text(text: "TextSurvey") -> list[str]:
    more = "" if text.whole else "more than "
    unit = "blank-line-separated parts" if text.source.text_column == "part" else "documents"
    lines = [
        f"{text.place}: {more}{text.bytes / 1e6:,.2f} MB in {text.documents:,} {unit}, {text.script} script",
        f"  typically {text.median_bytes:,.0f} bytes; {text.duplicates:,} duplicates, dropped: "
        f"{drop_counts(text.dropped, {})}",
    ]
    return [*lines, *([f"  {text.note}"] if text.note else [])]
