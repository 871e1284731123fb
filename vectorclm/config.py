"""Experiment and suite files: one TOML file holds every setting that defines a result, and none of the machine."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from vectorclm.corpus.sources import CorpusConfig, anchored, benchmark_sources
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.errors import ConfigError
from vectorclm.evaluation.config import EvaluateConfig, Questions
from vectorclm.formats.toml_files import parse_toml, read_settings_file
from vectorclm.model_config import ModelConfig
from vectorclm.settings import NAME, NAME_LENGTH, Settings, validate
from vectorclm.shards.config import MIX_BLOCK, ChatConfig, ChatSource, ShardsConfig
from vectorclm.tokenizer import TokenizerConfig
from vectorclm.train_config import FinetuneConfig, PretrainConfig, TrainingWork, too_small_to_mix

EXPERIMENTS = Path(__file__).parent / "experiments"


class ExperimentConfig(Settings):
    """The settings of all stages, in the order of the data flow."""

    name: str = Field(
        pattern=NAME, max_length=NAME_LENGTH, description="Name of the experiment in runs, reports and cards"
    )
    seed: int = Field(ge=0, lt=2**32, description="The seed of every random choice")
    world: WorldConfig | None = None
    sample: CorpusConfig
    tokenizer: TokenizerConfig
    shards: ShardsConfig
    model: ModelConfig
    pretrain: PretrainConfig
    chat: ChatConfig | None = Field(
        default=None,
        exclude_if=lambda chat: chat is None,
        description="If left out, the experiment ends at the base model",
    )
    finetune: FinetuneConfig | None = Field(
        default=None, exclude_if=lambda finetune: finetune is None, description="Needed with chat, and only then"
    )
    evaluate: EvaluateConfig

    @property
    def chat_sources(self) -> list[ChatSource]:
        """The sources of conversations; none where the experiment ends at the base model."""
        return self.chat.sources if self.chat is not None else []

    @property
    def replay(self) -> float:
        """The share of pretraining text in fine-tuning."""
        return self.finetune.replay if self.finetune is not None else 0.0

    def held_out_tokens(self, sampled: float) -> float:
        """The held-out tokens of a sample of so many tokens: at least a window of each source."""
        least = self.shards.sequence_length * len(self.sample.sources)
        return max(float(least), sampled * self.sample.validation_share)

    def pretraining_work(self, sampled: float) -> TrainingWork:
        """What pretraining computes with a sample of so many tokens."""
        length = self.shards.sequence_length
        windows, held_out = self.pretrain.tokens // length, self.held_out_tokens(sampled)
        return self.pretrain.work(windows, length, held_out, len(self.sample.sources))

    @model_validator(mode="after")
    def _stages_agree(self) -> Self:
        if self.model.vocab_size != self.tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size ({self.model.vocab_size}) and tokenizer.vocab_size "
                f"({self.tokenizer.vocab_size}) must be equal"
            )
        if (self.chat is None) != (self.finetune is None):
            given, absent = ("chat", "finetune") if self.chat is not None else ("finetune", "chat")
            raise ValueError(f"[{given}] needs [{absent}]: give both, or leave out both to end at the base model")
        lengths = {"shards": self.shards.sequence_length}
        if self.chat is not None:
            lengths["chat"] = self.chat.sequence_length
        for where, length in lengths.items():
            if length > self.model.max_position_embeddings:
                raise ValueError(
                    f"{where}.sequence_length ({length}) is longer than the model's "
                    f"max_position_embeddings ({self.model.max_position_embeddings})"
                )
        step = self.pretrain.batch_size * self.shards.sequence_length
        if self.pretrain.tokens < step:
            raise ValueError(
                f"pretrain.phases have {self.pretrain.tokens} tokens, less than one step: batch_size "
                f"({self.pretrain.batch_size}) windows of {self.shards.sequence_length}"
            )
        if self.chat is not None and self.finetune is not None:  # a conversation fits into one window
            count = sum(source.conversations for source in self.chat.sources)
            self.finetune.check_step(count, f"at most {count:,} windows of conversations")
        self._check_mixes({source.label for source in self.sample.sources})
        benchmarks = benchmark_sources(self.sample, self.evaluate.tasks)  # their labels must differ
        everything = [*self.sample.sources, *benchmarks, *self.chat_sources, *self.evaluate.tasks]
        if self.world is None and (lost := sorted({source.label for source in everything if source.is_generated})):
            raise ValueError(f"{', '.join(lost)} read the generated world, but there is no [world]")
        return self

    def _check_mixes(self, labels: set[str]) -> None:
        """Raise ValueError where phases or the replayed text name sources that the sample cannot mix."""
        for number, phase in enumerate(self.pretrain.phases, 1):
            if unknown := sorted(set(phase.weights) - labels):
                raise ValueError(
                    f"phase {number} weighs {', '.join(unknown)}, but the sources are {', '.join(sorted(labels))}"
                )
        if any(not phase.weights for phase in self.pretrain.phases):
            mix = {source.label: source.weight for source in self.sample.sources}
            if too_small := too_small_to_mix(mix):
                raise ValueError(
                    f"{', '.join(too_small)} has less than 1/{MIX_BLOCK} of the weight of all sources: raise it "
                    "in sample.sources, or give each phase weights of its own"
                )
        if self.replay and self.chat is not None:
            if self.shards.sequence_length != self.chat.sequence_length:
                raise ValueError(
                    f"finetune.replay mixes text and conversations: shards.sequence_length "
                    f"({self.shards.sequence_length}) and chat.sequence_length ({self.chat.sequence_length}) must be "
                    "equal"
                )
            if same := labels & {"chat", *(source.label for source in self.chat_sources)}:
                raise ValueError(
                    f"finetune.replay mixes the sources of sample and chat: {', '.join(sorted(same))} need other "
                    "labels in sample.sources"
                )


def load_experiment(name_or_path: str) -> tuple[ExperimentConfig, Path]:
    """Load the experiment of a name (`tiny`, `small`, `base`, or `x` of `x.toml` here) or file; return it and its path.

    Raises ConfigError that names the file, every bad key and the valid keys.
    """
    path = Path(name_or_path)
    if not path.suffix:
        path = EXPERIMENTS / f"{name_or_path}.toml"
        if not path.is_file() and Path(f"{name_or_path}.toml").is_file():
            path = Path(f"{name_or_path}.toml")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in EXPERIMENTS.glob("*.toml")))
        raise ConfigError(f"no experiment {name_or_path!r}: use {known}, or the path of a TOML file")
    return _anchored(validate(ExperimentConfig, read_config(path), str(path)), path.absolute().parent), path


def experiment_here() -> str | None:
    """The experiment file in the working directory; None without one. Raises ConfigError where there are several."""
    found = [path.name for path in sorted(Path.cwd().glob("*.toml")) if _is_experiment(path)]
    if len(found) > 1:
        raise ConfigError(f"this folder has several experiments: name one of {', '.join(found)}")
    return found[0] if found else None


def _is_experiment(path: Path) -> bool:
    with suppress(ConfigError):
        return {"name", "sample", "pretrain"} <= read_config(path).keys()
    return False


def _anchored(experiment: ExperimentConfig, folder: Path) -> ExperimentConfig:
    """The experiment with the paths of its sources relative to the folder of its file."""

    def moved(config: Any, *names: str) -> Any:
        lists = {name: [anchored(source, folder) for source in getattr(config, name)] for name in names}
        return config.model_copy(update=lists)

    sections = {"sample": moved(experiment.sample, "sources", "decontaminate_with")}
    sections["evaluate"] = moved(experiment.evaluate, "tasks")
    if experiment.chat is not None:
        sections["chat"] = moved(experiment.chat, "sources")
    return experiment.model_copy(update=sections)


def read_config(path: Path) -> dict[str, Any]:
    """Parse a TOML or JSON file. Raises ConfigError with the place of a syntax error, or where it is too large."""
    return read_settings_file(path)


def override(experiment: ExperimentConfig, texts: Sequence[str]) -> ExperimentConfig:
    """Apply `a.b.0.c=VALUE` assignments to an experiment; a value is TOML, or else a plain string.

    Raises ConfigError for a text that is not an assignment, and for an unknown key or an invalid value.
    """
    return changed(experiment, assignments(texts))


def assignments(texts: Sequence[str]) -> dict[str, Any]:
    """Parse `a.b.0.c=VALUE` assignments. Raises ConfigError for a text that is not an assignment."""
    changes: dict[str, Any] = {}
    for assignment in texts:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment}: write KEY=VALUE, such as finetune.epochs=2.0")
        try:
            changes[key.strip()] = parse_toml(f"value = {text}")["value"]
        except ValueError:
            changes[key.strip()] = text
    return changes


def changed(experiment: ExperimentConfig, changes: Mapping[str, Any]) -> ExperimentConfig:
    """The experiment with new values at the dotted keys `a.b.0.c`.

    Raises ConfigError for an unknown key or an invalid value.
    """
    values: Any = experiment.model_dump()
    for key, value in changes.items():
        *path, last = key.split(".")
        inside = values
        for part in path:
            inside = _member(inside, part, key)
        _member(inside, last, key, value)
    return validate(ExperimentConfig, values, "changed settings") if changes else experiment


_ABSENT = object()


def _member(inside: Any, part: str, key: str, value: Any = _ABSENT) -> Any:
    """Return the member `part` of a table or list, after setting it to `value` if given."""
    if isinstance(inside, list) and part.isdigit() and int(part) < len(inside):
        if value is not _ABSENT:
            inside[int(part)] = value
        return inside[int(part)]
    if not isinstance(inside, dict):
        where = f"number 0 to {len(inside) - 1}" if isinstance(inside, list) else "setting"
        raise ConfigError(f"{key}: {part!r} is not a {where} here")
    if value is not _ABSENT:
        inside[part] = value
    elif inside.get(part) is None:
        inside[part] = {}  # the validation of the experiment then reports an unknown key
    return inside[part]


SUITES = EXPERIMENTS / "suites"


class Suite(Questions):
    """An evaluation suite: benchmarks and other questions for any model."""

    name: str = Field(pattern=NAME, max_length=NAME_LENGTH, description="Name of the suite in results and curves")
    seed: int = Field(default=1, ge=0, lt=2**32, description="Seed of the choice of items")
    experiment: ExperimentConfig | None = Field(
        default=None, description="An experiment whose held-out text and conversations are scored, too"
    )

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if not self.tasks and self.experiment is None:
            raise ValueError("a suite needs [[tasks]]")
        if self.world is None and (lost := [task.label for task in self.tasks if task.is_generated]):
            raise ValueError(f"{', '.join(lost)} read the generated world, which only an experiment has")
        return self

    @property
    def world(self) -> WorldConfig | None:
        """The settings of the generated world that tasks read."""
        return self.experiment.world if self.experiment is not None else None

    @classmethod
    def of(cls, experiment: ExperimentConfig) -> Self:
        """The suite of an experiment's own evaluation."""
        return cls(name=experiment.name, seed=experiment.seed, experiment=experiment, **dict(experiment.evaluate))


def load_suite(name_or_path: str) -> tuple[Suite, Path]:
    """Load a suite by the name or file of a suite or an experiment; return it and its path.

    Raises ConfigError that names the file, every bad key and the valid keys.
    """
    path = Path(name_or_path)
    if not path.suffix:
        places = (SUITES / f"{name_or_path}.toml", EXPERIMENTS / f"{name_or_path}.toml")
        path = next((place for place in places if place.is_file()), path)
    if not path.is_file():
        suites, experiments = (
            ", ".join(sorted(file.stem for file in folder.glob("*.toml"))) for folder in (SUITES, EXPERIMENTS)
        )
        raise ConfigError(
            f"no suite {name_or_path!r}: use {suites}, an experiment ({experiments}), or the path of a TOML file"
        )
    values = read_config(path)
    if "sample" in values:
        return Suite.of(validate(ExperimentConfig, values, str(path))), path
    return validate(Suite, values, str(path)), path
