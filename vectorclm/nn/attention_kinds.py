"""The kinds of attention: which keys a query attends to. Shape letters: model.py.

Each kind has a row in ATTENTION_KINDS, and its settings are fields of AttentionConfig.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from vectorclm.settings import Settings

if TYPE_CHECKING:  # an experiment's settings are read without torch
    from torch import Tensor

AttentionKind = Literal["causal"]


class AttentionConfig(Settings):
    """The kind of attention, and the settings of each kind that has some.

    Every field has a default and `exclude_if` for it: a kind keeps its fingerprints when other kinds get settings.
    """

    kind: AttentionKind = Field(
        default="causal", exclude_if=lambda value: value == "causal", description="Which keys a query attends to"
    )


@dataclass(frozen=True)
class AttentionSpec:
    """One kind of attention: the rule of its mask, and its names in `config.json` of Hugging Face."""

    # True [..., T, S] where a query attends to a key: never for a later key, always for the query's own. Arguments:
    # the settings, the number of the layer (from 0), the positions of the queries [..., T, 1] and keys [..., 1, S].
    mask_rule: Callable[[AttentionConfig, int, "Tensor", "Tensor"], "Tensor"]
    model_type: str  # where transformers lacks the kind, a name that transformers refuses
    architecture: str  # transformers' class of the model
    is_causal: bool = False  # whether the rule is causality alone, which the fast forms and llama.cpp compute
    config_keys: Mapping[str, str] = field(default_factory=dict)  # fields of AttentionConfig: keys in config.json


def _causal(config: AttentionConfig, layer: int, query_T1: "Tensor", key_1S: "Tensor") -> "Tensor":
    return key_1S <= query_T1


ATTENTION_KINDS: Mapping[AttentionKind, AttentionSpec] = {
    "causal": AttentionSpec(_causal, "llama", "LlamaForCausalLM", is_causal=True),
}
