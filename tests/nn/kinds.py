"""Every kind of attention, each with a rule in plain Python to test against, and two kinds that only tests have."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import pytest
from pydantic import Field
from torch import Tensor

from vectorclm.model_config import ModelConfig
from vectorclm.nn.attention_kinds import ATTENTION_KINDS, AttentionConfig, AttentionSpec


class ExampleConfig(AttentionConfig):
    """The settings of the two kinds that only tests have."""

    kind: Literal["sliding", "alternating"]  # type: ignore[assignment]
    window: int = Field(10, exclude_if=lambda value: value == 10, description="Newest keys that a token attends to")


class ExampleModelConfig(ModelConfig):
    """A model's configuration that takes `ExampleConfig`."""

    attention: ExampleConfig


class Kind(NamedTuple):
    """A kind with settings that hide keys in a text of 13 tokens, unless its rule is causal, and the rule in Python."""

    config: AttentionConfig
    attends: Callable[[int, int, int], bool]  # from the layer, the query's position and the key's


def _sliding(config: Any, layer: int, query_T1: Tensor, key_1S: Tensor) -> Tensor:
    return (key_1S <= query_T1) & (query_T1 - key_1S < config.window)


def _alternating(config: Any, layer: int, query_T1: Tensor, key_1S: Tensor) -> Tensor:
    return (key_1S <= query_T1) & (query_T1 < key_1S + config.window) if layer % 2 else key_1S <= query_T1


EXAMPLE_SPECS = {
    "sliding": AttentionSpec(_sliding, "example_sliding", "Example", config_keys={"window": "sliding_window"}),
    "alternating": AttentionSpec(_alternating, "example_alternating", "Example", config_keys={"window": "window"}),
}
KINDS: dict[str, Kind] = {
    "causal": Kind(AttentionConfig(), lambda layer, query, key: key <= query),
    "sliding": Kind(ExampleConfig(kind="sliding", window=12), lambda layer, query, key: key <= query < key + 12),
    "alternating": Kind(
        ExampleConfig(kind="alternating", window=11),
        lambda layer, query, key: key <= query and (layer % 2 == 0 or query < key + 11),
    ),
}


def with_attention(config: ModelConfig, kind: str) -> ModelConfig:
    """The configuration of a model with another kind of attention."""
    attention = KINDS[kind].config
    if kind in EXAMPLE_SPECS:
        return ExampleModelConfig(**config.model_dump(exclude={"attention"}), attention=attention)
    return config.model_copy(update={"attention": attention})


@contextmanager
def registered(kind: str) -> Iterator[None]:
    """Make a kind known to the product; kinds of the product are already."""
    with pytest.MonkeyPatch.context() as patch:
        if kind in EXAMPLE_SPECS:
            patch.setitem(ATTENTION_KINDS, kind, EXAMPLE_SPECS[kind])
            patch.setattr("vectorclm.model_config.ModelConfig", ExampleModelConfig)
        yield
