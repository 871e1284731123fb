"""Constrained decoding: only tokens that keep an answer inside a JSON schema are drawn (llguidance)."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer
from torch import Tensor

from vectorclm.errors import DataError

# Without them a small model can fill its answer with line breaks, which JSON allows between any two values.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

SUBSCHEMAS = {"items", "prefixItems", "anyOf", "oneOf", "additionalProperties"}  # keys that hold schemas
NAMED_SUBSCHEMAS = {"properties", "$defs", "definitions"}  # keys that hold schemas by name
OPEN = {"additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "$ref"}  # say or may say more


class Grammar:
    """The state of one answer inside a grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self, logits_V: Tensor) -> Tensor:
        """The logits, with -inf for tokens that the grammar does not allow next."""
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed_V = (packed[:, None] >> torch.arange(8)).bitwise_and(1).flatten()[: self._vocab_size].bool()
        return logits_V.masked_fill(~allowed_V.to(logits_V.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Move on by a token that was drawn. Raises DataError where the grammar grows too complex."""
        if not self._matcher.consume_token(token):
            raise DataError(f"the schema is too complex: {self._matcher.get_error()}")

    @property
    def is_complete(self) -> bool:
        """Whether the text is complete, and nothing may follow."""
        return self._matcher.is_stopped()


class GrammarCompiler:
    """Compiles JSON schemas to grammars over the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._end_ids, self.vocab_size = tokenizer, list(end_ids), tokenizer.get_vocab_size()

    @cached_property
    def _tokens(self) -> LLTokenizer:
        return LLTokenizer(self._tokenizer.to_str(), n_vocab=self.vocab_size, eos_token=self._end_ids)

    def compile(self, schema: Mapping[str, Any] | bool) -> LLMatcher:
        """The grammar of the JSON texts that a schema allows; an object has the properties that the schema names.

        Raises DataError where the schema is not supported.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(closed(schema)), overrides=COMPACT)  # type: ignore[arg-type]
        except ValueError as error:
            raise DataError(f"the schema cannot be used: {error}") from error
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise DataError(f"the schema cannot be used: {matcher.get_error().splitlines()[0]}")
        return matcher

    def begin(self, matcher: LLMatcher) -> Grammar:
        """The grammar at the beginning of an answer."""
        return Grammar(matcher.deep_copy(), self.vocab_size)


def closed(schema: Any) -> Any:
    """The schema, where objects have no more properties than those it names, unless it says that they may have others.

    Without this, a small model adds properties until its answer is cut. Inside `allOf` nothing changes: each part
    there names some of the properties only.
    """
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) if key in SUBSCHEMAS else value for key, value in schema.items()}
    for key in NAMED_SUBSCHEMAS & found.keys():
        if isinstance(found[key], dict):
            found[key] = {name: closed(value) for name, value in found[key].items()}
    if "properties" in found and not found.keys() & OPEN:
        found["additionalProperties"] = False
    return found
