"""The run form: an empty field changes nothing, each field reaches its setting, and a wrong one is named."""

from typing import Any

import pytest
from pydantic import ValidationError

from flows.form import Changes, chosen
from vectorclm.config import ExperimentConfig, load_experiment
from vectorclm.errors import ConfigError


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
