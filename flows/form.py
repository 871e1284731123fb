"""The run form in the Prefect UI: the settings of an experiment that a person may change before a run.

Prefect draws a form from the JSON schema of these classes. Each deployment has the form of one experiment, filled with
its values. A field that is left out changes nothing.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from flows.experiments import load_known
from vectorclm.config import ExperimentConfig, changed
from vectorclm.errors import ConfigError
from vectorclm.settings import Settings, validate
from vectorclm.store.layout import StageName

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]
SuiteName = Literal["tiny", "small", "base", "standard", "generation"]
Again = Literal["nothing", StageName]


class SampleChanges(Settings):
    """Documents that are drawn from the sources."""

    bytes: int | None = Field(
        None, ge=10_000, title="Size of the sample", description="Over all sources, in bytes, at least 10,000"
    )
    validation_share: float | None = Field(
        None, gt=0, lt=0.5, title="Share held out", description="Share of the documents, between 0 and 0.5"
    )


class TokenizerChanges(Settings):
    """The byte-level BPE tokenizer."""

    vocab_size: int | None = Field(
        None, ge=300, le=65_536, title="Vocabulary", description="Of tokenizer and model, in tokens, 300 to 65,536"
    )
    bytes: int | None = Field(
        None, ge=10_000, title="Text to learn from", description="For the merges, in bytes, at least 10,000"
    )


class ShardsChanges(Settings):
    """Documents as windows of tokens."""

    sequence_length: int | None = Field(
        None, ge=8, le=65_536, title="Length of a window", description="In tokens, 8 to 65,536"
    )


class ChatChanges(Settings):
    """Conversations as windows of tokens."""

    sequence_length: int | None = Field(
        None, ge=8, le=65_536, title="Length of a window", description="In tokens, 8 to 65,536"
    )
    validation_share: float | None = Field(
        None, gt=0, lt=0.5, title="Share held out", description="Share of the conversations, between 0 and 0.5"
    )


class ModelChanges(Settings):
    """The shape of the decoder."""

    num_hidden_layers: int | None = Field(None, ge=1, le=128, title="Layers", description="1 to 128")
    hidden_size: int | None = Field(
        None, ge=16, le=8192, title="Width", description="Of the residual stream, in features, 16 to 8,192"
    )
    intermediate_size: int | None = Field(
        None, ge=16, le=32_768, title="Width inside the MLP", description="In features, 16 to 32,768"
    )


class TrainingChanges(Settings):
    """The optimizer and the batches."""

    learning_rate: float | None = Field(
        None, gt=0, le=1, title="Learning rate", description="Peak rate of the hidden matrices, above 0 and at most 1"
    )
    adamw_learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        title="Learning rate of AdamW",
        description="Peak rate of embeddings and norms, above 0 and at most 1",
    )
    batch_size: int | None = Field(
        None, ge=1, le=65_536, title="Batch size", description="Windows in one optimizer step, 1 to 65,536"
    )


class PretrainChanges(TrainingChanges):
    """Training of the base model."""

    tokens: int | None = Field(
        None,
        ge=1_000,
        title="Token budget",
        description="Tokens of all phases together, at least 1,000; each phase keeps its share",
    )


class FinetuneChanges(TrainingChanges):
    """Training of the chat model on conversations."""

    epochs: float | None = Field(
        None, gt=0, le=100, title="Epochs", description="Passes over the conversations, above 0 and at most 100"
    )
    replay: float | None = Field(
        None, ge=0, lt=1, title="Replayed text", description="Share of pretraining text in each batch, from 0, below 1"
    )


class EvaluateChanges(Settings):
    """The scores of both models."""

    chat_prompts: int | None = Field(
        None, ge=1, title="Held-out conversations", description="How many get an answer that is checked, at least 1"
    )
    max_new_tokens: int | None = Field(None, ge=1, le=4096, title="Longest answer", description="In tokens, 1 to 4,096")


class Changes(Settings):
    """Settings of the experiment, in the order of the pipeline; a field that is left out changes nothing."""

    seed: int | None = Field(
        None, ge=0, lt=2**32, title="Random seed", description="Of all random choices, 0 to 4,294,967,295"
    )
    sample: SampleChanges = Field(SampleChanges(), title="Documents")
    tokenizer: TokenizerChanges = Field(TokenizerChanges(), title="Tokenizer")
    shards: ShardsChanges = Field(ShardsChanges(), title="Windows of text")
    chat: ChatChanges = Field(ChatChanges(), title="Conversations")
    model: ModelChanges = Field(ModelChanges(), title="Model")
    pretrain: PretrainChanges = Field(PretrainChanges(), title="Pretraining")
    finetune: FinetuneChanges = Field(FinetuneChanges(), title="Fine-tuning")
    evaluate: EvaluateChanges = Field(EvaluateChanges(), title="Evaluation")
    settings: dict[str, Any] = Field(
        default={},
        title="Any other setting",
        description='By its dotted name in the experiment\'s file, such as {"pretrain.optimizer.momentum": 0.9}',
    )


SECTIONS: dict[str, type[Settings]] = {
    name: field.annotation
    for name, field in Changes.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
}
STAGE_SECTIONS = {
    "sample": ("sample",),
    "tokenizer": ("tokenizer",),
    "shards": ("shards",),
    "chat_shards": ("chat",),
    "pretrain": ("model", "pretrain"),
    "evaluate_base": ("evaluate",),
    "finetune": ("finetune",),
    "evaluate": ("evaluate",),
}
FIELDS = {  # title and description of the parameters of flows
    "model": (
        "Model",
        "models:/NAME@ALIAS or models:/NAME/VERSION of MLflow's registry; STORE/STAGE/FINGERPRINT of any store; or a "
        "folder on the worker",
    ),
    "suite": (
        "Suite",
        "A file of benchmarks (standard, generation), or the evaluation of an experiment: its benchmarks, and its "
        "held-out text and conversations if the store has them",
    ),
    "limits": ("Limits", "How much is measured; results with different limits are not compared"),
    "stage": ("Stage", "The stages before it must be finished, for the same values; they are reused"),
    "experiment": ("Experiment", "Each experiment has a deployment of its own, with its own values"),
    "dry_run": ("Dry run", "Build nothing: show under Artifacts what the run would reuse, build and cost"),
    "changes": ("Settings of the experiment", "In the order of the pipeline"),
    "settings": (
        "Any other setting",
        'By its dotted name in the file, such as {"pretrain.optimizer.momentum": 0.9}; wins over the fields',
    ),
    "data": (
        "Local mirror",
        "Folder on the worker with the sources in the hub's schemas; empty: they are read from the hub",
    ),
    "again_from": ("Rebuild from", "Rebuild this finished stage and all that depend on it, and compare every byte"),
    "again": ("Rebuild", "Rebuild the stage beside its finished artifact, and compare every byte"),
    "runtime": ("Machine", "How the machine runs it; never part of a result's fingerprint"),
}
_SETTING = {
    "learning_rate": "optimizer.learning_rate",
    "adamw_learning_rate": "optimizer.adamw_learning_rate",
}


def chosen(name: str, changes: Changes, settings: Mapping[str, Any] | None = None) -> tuple[ExperimentConfig, Path]:
    """The experiment that a run form describes, and its file. Raises ConfigError naming the setting that is wrong.

    `settings`, by dotted names, win over the fields. Settings of every section need no file of the experiment.
    """
    dotted = {**changes.settings, **(settings or {})}
    if set(ExperimentConfig.model_fields) - {"name", "world"} <= set(dotted):
        return validate(ExperimentConfig, {"name": name, **dotted}, name), Path(f"{name}.toml")
    experiment, path = load_known(name)
    own = values(experiment)
    wanted: dict[str, Any] = {}
    if absent := [
        section for section in changes.model_dump(exclude_defaults=True) if section not in {*own, "settings"}
    ]:
        raise ConfigError(f"experiment {name} has no section {', '.join(absent)}: leave its fields out")
    for section, fields in changes.model_dump(exclude_none=True, exclude={"settings"}).items():
        if section == "seed":
            wanted["seed"] = fields
            continue
        if section not in own:
            continue
        for key, value in fields.items():
            if own[section].get(key) != value:
                wanted[f"{section}.{_SETTING.get(key, key)}"] = value
    if (size := wanted.get("tokenizer.vocab_size")) is not None:
        wanted["model.vocab_size"] = size
    if (tokens := wanted.pop("pretrain.tokens", None)) is not None:
        whole = experiment.pretrain.tokens
        for number, phase in enumerate(experiment.pretrain.phases):
            wanted[f"pretrain.phases.{number}.tokens"] = max(1, round(phase.tokens * tokens / whole))
    return changed(experiment, wanted | dotted), path


def values(experiment: ExperimentConfig) -> dict[str, Any]:
    """The values of an experiment for the fields of the form, without the sections that the experiment lacks.

    A value outside the bounds of its field is left out.
    """
    found: dict[str, Any] = {"seed": experiment.seed}
    for section, fields in SECTIONS.items():
        if getattr(experiment, section) is None:
            continue
        found[section] = {}
        for key in fields.model_fields:
            value: Any = getattr(experiment, section)
            for part in _SETTING.get(key, key).split("."):
                value = getattr(value, part)
            if _fits(fields, key, value):
                found[section][key] = value
    return found


def _fits(fields: type[Settings], key: str, value: Any) -> bool:
    try:
        validate(fields, {key: value}, key)
    except ConfigError:
        return False
    return value is not None


def described(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of a flow with a title and a description for each parameter.

    Parameters with a default are required: the deployment has their values, and Prefect marks others as optional.
    """
    made = deepcopy(dict(schema))
    for name, shape in made["properties"].items():
        title, about = FIELDS[name]
        made["properties"][name] = {**shape, "title": title, "description": about}
    made["required"] = [name for name, shape in made["properties"].items() if "default" in shape]
    return made


def defaults(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The default values of the parameters of a flow, without those of None, which no field takes."""
    found = {name: shape["default"] for name, shape in schema["properties"].items() if "default" in shape}
    return _known(found)


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not None, also of the mappings inside."""
    return {
        name: _known(value) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if value is not None
    }


def form(schema: Mapping[str, Any], experiment: ExperimentConfig, stage: str | None = None) -> dict[str, Any]:
    """The JSON schema of the form of an experiment, or of one of its stages, from the schema of the flow.

    Every field shows the experiment's value. Fields with a value are required: Prefect marks others as optional.
    """
    made = described(schema)
    properties = made["properties"]
    properties["experiment"] |= {"enum": [experiment.name], "default": experiment.name}
    if stage is not None:
        properties["stage"] |= {"enum": [stage], "default": stage}
    section = _section(Changes, shown(experiment, stage), properties["changes"])
    if stage is not None:  # of a curriculum they are a parameter of their own
        section["properties"]["settings"] = Changes.model_json_schema()["properties"]["settings"]
    properties["changes"] = section
    made["required"] = list(properties)
    return made


def parameters(schema: Mapping[str, Any], experiment: ExperimentConfig, stage: str | None = None) -> dict[str, Any]:
    """The values of all fields of a form, which a run takes where its request leaves one out."""
    return {**defaults(schema), "changes": shown(experiment, stage)}


def shown(experiment: ExperimentConfig, stage: str | None = None) -> dict[str, Any]:
    """The values of an experiment that the form shows: of one stage, only those that no stage above it reads."""
    all_values = values(experiment)
    return (
        all_values
        if stage is None
        else {name: all_values[name] for name in STAGE_SECTIONS.get(stage, ()) if name in all_values}
    )


def completed(usual: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters for a deployment whose parameters are `usual`: fields that `given` leaves out keep their values.

    Other settings inside `changes`, where older forms had them, become a parameter of their own.
    """
    changes = dict(given.get("changes") or {})
    other = {**changes.pop("settings", {}), **(given.get("settings") or {})}
    filled: dict[str, Any] = dict(usual.get("changes") or {})
    for name, value in changes.items():
        if isinstance(value, Mapping):
            left = {key: each for key, each in value.items() if each is not None}
            filled[name] = {**filled.get(name, {}), **left}
        elif value is not None:
            filled[name] = value
    return {**given, "changes": filled, **({"settings": other} if other else {})}


def _section(fields: type[BaseModel], filled: Mapping[str, Any], around: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a section, with its sub-sections inside, as Prefect's two pages draw it."""
    drawn = fields.model_json_schema()["properties"]
    properties: dict[str, Any] = {}
    for name, value in filled.items():
        shape = {key: part for key, part in drawn[name].items() if key not in ("$ref", "allOf", "default")}
        if isinstance(value, Mapping):
            properties[name] = _section(SECTIONS[name], value, {**shape, "description": SECTIONS[name].__doc__})
        else:
            properties[name] = {**shape, "default": value}
    kept = {key: part for key, part in around.items() if key in ("title", "description", "position")}
    shape = {"type": "object", "properties": properties, "required": list(properties), "default": dict(filled)}
    return {**kept, **shape, "additionalProperties": False}
