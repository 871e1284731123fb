"""The run form: an empty field changes nothing, each field reaches its setting, and a wrong one is named."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flows.experiments import FOLDER
from flows.form import SECTIONS, STAGE_SECTIONS, Changes, chosen, completed, form, parameters, shown, values
from vectorclm.config import ExperimentConfig, load_experiment, override
from vectorclm.errors import ConfigError
from vectorclm.stages import TABLE


def experiment(name: str = "tiny", **changes: Any) -> ExperimentConfig:
    return chosen(name, Changes.model_validate(changes))[0]


def test_an_empty_form_is_the_experiment_of_the_file() -> None:
    for name in ("tiny", "small", "base"):
        assert chosen(name, Changes()) == load_experiment(name)


def test_each_field_reaches_its_setting() -> None:
    found = experiment(
        seed=7,
        sample={"bytes": 20_000},
        tokenizer={"vocab_size": 400},
        model={"num_hidden_layers": 1},
        pretrain={"learning_rate": 0.5, "batch_size": 3},
        finetune={"epochs": 0.25, "adamw_learning_rate": 0.125},
        evaluate={"chat_prompts": 2},
    )
    assert (found.seed, found.sample.bytes, found.model.num_hidden_layers) == (7, 20_000, 1)
    assert found.tokenizer.vocab_size == found.model.vocab_size == 400  # one field for both
    assert (found.pretrain.optimizer.learning_rate, found.pretrain.batch_size) == (0.5, 3)
    assert found.finetune is not None
    assert (found.finetune.epochs, found.finetune.optimizer.adamw_learning_rate) == (0.25, 0.125)
    assert found.evaluate.chat_prompts == 2
    tiny = load_experiment("tiny")[0]
    assert found.pretrain.optimizer.adamw_learning_rate == tiny.pretrain.optimizer.adamw_learning_rate


def test_a_token_budget_keeps_the_share_of_each_phase() -> None:
    before = load_experiment("base")[0].pretrain
    after = experiment("base", pretrain={"tokens": before.tokens // 2}).pretrain
    assert len(after.phases) == len(before.phases) > 1
    for new, old in zip(after.phases, before.phases, strict=True):
        assert new.tokens == pytest.approx(old.tokens / 2, abs=1)
    with pytest.raises(ConfigError, match=r"pretrain\.phases have 1000 tokens, less than one step"):
        experiment("base", pretrain={"tokens": 1_000})


def test_any_other_setting_is_taken_by_its_dotted_name_and_wins() -> None:
    found = experiment(seed=7, settings={"pretrain.optimizer.momentum": 0.5, "seed": 8})
    assert (found.pretrain.optimizer.momentum, found.seed) == (0.5, 8)
    with pytest.raises(ConfigError, match=r"pretrain\.batchsize: unknown key; did you mean 'batch_size'"):
        experiment(settings={"pretrain.batchsize": 3})


def fields() -> list[str]:
    return [f"{section}.{key}" for section, shown_there in SECTIONS.items() for key in shown_there.model_fields]


@pytest.mark.parametrize("field", fields())
def test_the_name_of_a_field_on_the_command_line_is_a_setting_or_names_the_one_that_it_sets(field: str) -> None:
    tiny = load_experiment("tiny")[0]
    section, _, key = field.partition(".")
    value = values(tiny)[section][key]
    wanted = type(value)((value or 0.5) * 0.75)
    try:
        found = override(tiny, [f"{field}={wanted}"])
    except ConfigError as refused:
        if "unknown key" not in str(refused) and field in str(refused):  # it is there, and disagrees with another one
            return
        named = re.search(rf"{field}: unknown key; did you mean '(.+?)'", str(refused))
        assert named is not None, refused
        found = override(tiny, [f"{named[1]}={wanted}"])
    now = values(found)[section][key]
    assert now != value and (now == wanted or field == "pretrain.tokens")  # the sum of all phases


def test_a_setting_in_the_wrong_section_is_named_where_it_is() -> None:
    tiny = load_experiment("tiny")[0]
    for wrong, right in (
        ("sample.vocab_size", "'tokenizer.vocab_size' or 'model.vocab_size'"),
        ("learning_rate", "'pretrain.optimizer.learning_rate' or 'finetune.optimizer.learning_rate'"),
        ("pretrain.phases.1.token", "'tokens'"),
        ("pretrain.tokens", r"'pretrain.phases.0.tokens' \(0: the first of the list\)\?"),
    ):
        with pytest.raises(ConfigError, match=rf"{wrong}: unknown key; did you mean {right}"):
            override(tiny, [f"{wrong}=1"])


@pytest.mark.parametrize(
    "changes",
    [
        {"sample": {"bytes": 9_999}},
        {"tokenizer": {"vocab_size": 299}},
        {"pretrain": {"tokens": 999}},
        {"pretrain": {"learning_rate": 0}},
        {"finetune": {"epochs": 101}},
        {"seed": -1},
        {"seeds": 1},
    ],
)
def test_a_value_outside_its_bounds_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Changes.model_validate(changes)


def base_only() -> ExperimentConfig:
    return load_experiment("tiny")[0].model_copy(update={"name": "base-only", "chat": None, "finetune": None})


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_the_values_of_an_experiment_change_nothing(name: str) -> None:
    assert chosen(name, Changes.model_validate(values(load_experiment(name)[0]))) == load_experiment(name)


def test_settings_of_every_section_need_no_file() -> None:
    for whole in (base_only(), load_experiment("tiny")[0]):
        settings = dict.fromkeys(ExperimentConfig.model_fields) | whole.model_dump(mode="json")
        del settings["name"]
        found, path = chosen("nowhere", Changes(settings=settings))
        assert found == whole.model_copy(update={"name": "nowhere"}) and path.name == "nowhere.toml"
    with pytest.raises(ConfigError, match="no experiment 'nowhere'"):
        chosen("nowhere", Changes(settings={"seed": 3}))


def test_other_settings_win_over_fields_and_older_forms() -> None:
    changes = Changes.model_validate({"seed": 2, "settings": {"seed": 3, "finetune.epochs": 4.0}})
    found = chosen("tiny", changes, {"seed": 5})[0]
    assert found.seed == 5 and found.finetune is not None and found.finetune.epochs == 4.0


def test_fields_that_are_left_out_keep_the_values_of_the_deployment() -> None:
    usual = {"changes": {"seed": 1, "sample": {"bytes": 5, "validation_share": 0.1}}}
    given = {"experiment": "tiny", "changes": {"sample": {"bytes": 6, "validation_share": None}, "settings": {"a": 1}}}
    assert completed(usual, {**given, "settings": {"b": 2}}) == {
        "experiment": "tiny",
        "changes": {"seed": 1, "sample": {"bytes": 6, "validation_share": 0.1}},
        "settings": {"a": 1, "b": 2},
    }
    assert completed(usual, {}) == usual and completed({}, {"changes": None}) == {"changes": {}}


SCHEMA: dict[str, Any] = {
    "properties": {
        "stage": {"type": "string"},
        "experiment": {"type": "string", "pattern": "x"},
        "changes": {"$ref": "#/definitions/Changes", "position": 1},
        "data": {"type": "string", "default": ""},
    }
}


def test_the_form_of_a_stage_has_the_settings_that_no_stage_above_it_reads() -> None:
    tiny = load_experiment("tiny")[0]
    schema = form(SCHEMA, tiny, "pretrain")
    assert schema["required"] == list(SCHEMA["properties"])
    assert schema["properties"]["stage"]["enum"] == ["pretrain"]
    assert schema["properties"]["experiment"]["enum"] == ["tiny"]
    sections = schema["properties"]["changes"]["properties"]
    assert list(sections) == ["model", "pretrain", "settings"]
    tokens = sections["pretrain"]["properties"]["tokens"]
    assert tokens["default"] == tiny.pretrain.tokens and tokens["minimum"] == 1000 and tokens["title"] == "Token budget"
    given = parameters(schema, tiny, "pretrain")
    assert given["stage"] == "pretrain" and given["data"] == "" and given["changes"] == shown(tiny, "pretrain")
    assert "enum" not in SCHEMA["properties"]["stage"]  # the flow's own schema stays
    assert set(STAGE_SECTIONS) <= {stage.name for stage in TABLE}
    assert {section for sections in STAGE_SECTIONS.values() for section in sections} == set(SECTIONS)


def test_a_stage_without_fields_has_the_other_settings_only() -> None:
    schema = form(SCHEMA, load_experiment("tiny")[0], "export")
    assert list(schema["properties"]["changes"]["properties"]) == ["settings"]


def test_an_experiment_that_ends_at_the_base_model_has_no_fields_of_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = base_only()
    assert not {"chat", "finetune"} & set(values(experiment))
    assert not {"chat", "finetune"} & set(form(SCHEMA, experiment)["properties"]["changes"]["properties"])
    monkeypatch.setenv(FOLDER, str(tmp_path))
    (tmp_path / "base-only.json").write_text(experiment.model_dump_json())
    assert chosen("base-only", Changes.model_validate(values(experiment)))[0] == experiment
    with pytest.raises(ConfigError, match="experiment base-only has no section finetune: leave its fields out"):
        chosen("base-only", Changes.model_validate({"finetune": {"epochs": 1.0}}))


def test_a_value_outside_the_bounds_of_its_field_is_not_shown() -> None:
    tiny = load_experiment("tiny")[0]
    large = tiny.model_copy(update={"evaluate": tiny.evaluate.model_copy(update={"max_new_tokens": 5000})})
    assert "max_new_tokens" not in values(large)["evaluate"] and "max_new_tokens" in values(tiny)["evaluate"]
