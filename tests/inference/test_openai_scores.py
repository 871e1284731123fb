"""Log-probabilities and JSON by a schema, as OpenAI's client receives them."""

import json
import math
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import torch
from pydantic import BaseModel, Field

from tests.inference.conftest import ANSWER, QUESTION, Served
from vectorclm.inference.chat import LanguageModel, open_language_model
from vectorclm.inference.grammar import closed
from vectorclm.inference.logprobs import TokenNames
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.conversations import Turn, render_prompt
from vectorclm.tokenizer import BOS_ID, encode

CLOSE = 1e-3  # nats: sums of a batch have another order


@pytest.fixture(scope="module")
def model(chat_folder: Path) -> LanguageModel:
    return open_language_model(str(chat_folder), Runtime(threads=1))


def logprobs_of(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [T - 1, V] of the tokens after the first."""
    with torch.inference_mode():
        return model.model(torch.tensor([ids]))[0, :-1].log_softmax(-1)


def test_each_token_of_an_answer_has_its_logprob_and_the_likeliest_ones(served: Served, model: LanguageModel) -> None:
    whole = served.ask(temperature=0, logprobs=True, top_logprobs=3)
    scores = whole.choices[0].logprobs.content
    assert b"".join(bytes(score.bytes) for score in scores[:-1]).decode() == ANSWER
    assert scores[-1].token == "<|im_end|>" and len(scores) == whole.usage.completion_tokens
    prompt = render_prompt(model.tokenizer, [Turn("user", "Who swims?")])
    ids = [*prompt, *encode(model.tokenizer, ANSWER), 3]
    expected = logprobs_of(model, ids)[len(prompt) - 1 :]
    for score, logprobs_V, token in zip(scores, expected, ids[len(prompt) :], strict=True):
        assert score.logprob == pytest.approx(float(logprobs_V[token]), abs=CLOSE)
        assert [one.logprob for one in score.top_logprobs] == pytest.approx(
            logprobs_V.topk(3).values.tolist(), abs=CLOSE
        )
        assert score.top_logprobs[0].token == score.token  # a greedy answer
    streamed = []
    for chunk in served.ask(temperature=0, logprobs=True, top_logprobs=3, stream=True):
        streamed += chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else []
    assert [score.token for score in streamed] == [score.token for score in scores]
    hot = served.ask(temperature=2, seed=1, logprobs=True, max_tokens=9).choices[0].logprobs.content
    assert len(hot) == 9 and all(score.logprob < 0 and score.top_logprobs == [] for score in hot)
    assert served.ask(temperature=0).choices[0].logprobs is None


@pytest.mark.parametrize("tokens", [0, 4])
def test_a_prompt_is_scored_where_it_is_echoed(served: Served, model: LanguageModel, tokens: int) -> None:
    """As evaluation harnesses ask; 300 tokens are more than one piece of a prompt."""
    for text in ("The otter swims", "Wer singt im Wald? 🙂 " * 25):
        ids = [BOS_ID, *encode(model.tokenizer, text)]
        for prompt in (text, ids):
            made = served.complete(prompt=prompt, temperature=0, max_tokens=tokens, logprobs=1, echo=True)
            found = made.choices[0].logprobs
            assert len(found.tokens) == len(ids) + tokens == made.usage.total_tokens
            assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
            expected = logprobs_of(model, ids)
            chosen = expected.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
            assert found.token_logprobs[1 : len(ids)] == pytest.approx(chosen, abs=CLOSE)
            for score, top, best in zip(
                found.token_logprobs[1:], found.top_logprobs[1:], expected.max(1)[0], strict=False
            ):
                assert len(top) == 1 and score <= max(top.values()) == pytest.approx(float(best), abs=CLOSE)
            assert found.text_offset[0] == 0 and found.text_offset[2] == len("".join(found.tokens[:2]))
            assert made.choices[0].text.startswith(text)


def test_the_names_of_tokens_are_their_bytes(model: LanguageModel) -> None:
    names, text = TokenNames(model.tokenizer), "Ça va, 你好 🙂! \x00\t~\xad"
    tokens = [names.of(token, 0.0) for token in encode(model.tokenizer, text)]
    assert b"".join(token.data for token in tokens).decode() == text
    cut = [token for token in tokens if token.text.startswith("bytes:")]
    assert cut and all(token.text == "bytes:" + "".join(f"\\x{value:02x}" for value in token.data) for token in cut)


class Animal(BaseModel):
    """What a client wants to know."""

    name: str = Field(max_length=12)
    kind: Literal["otter", "owl"]
    legs: int = Field(ge=0, le=99)
    swims: bool


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 2, "seed": 3}, {"temperature": 2, "n": 3}])
def test_an_answer_keeps_to_the_schema(served: Served, options: dict[str, Any]) -> None:
    """Our model was taught to say something else."""
    made = served.client().chat.completions.parse(
        model="otter", messages=QUESTION, response_format=Animal, max_tokens=200, **options
    )
    for choice in made.choices:
        assert choice.finish_reason == "stop" and isinstance(choice.message.parsed, Animal)
        assert json.loads(choice.message.content) == choice.message.parsed.model_dump()
    text = ""
    schema = {"name": "animal", "schema": Animal.model_json_schema(), "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    for chunk in served.ask(response_format=form, stream=True, max_tokens=200, **options):
        text += (chunk.choices[0].delta.content or "") if chunk.choices[0].index == 0 else ""
    Animal.model_validate_json(text)


def test_any_json_object_and_plain_text_can_be_asked_for(served: Served) -> None:
    made = served.ask(response_format={"type": "json_object"}, temperature=2, seed=2, max_tokens=300)
    assert made.choices[0].message.content.startswith("{")
    if made.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(made.choices[0].message.content), dict)
    assert served.ask(response_format={"type": "text"}, temperature=0).choices[0].message.content == ANSWER
    schema = {"name": "animal", "schema": Animal.model_json_schema()}
    form = {"type": "json_schema", "json_schema": schema}
    cut = served.ask(response_format=form, temperature=0, max_tokens=3)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3


def test_objects_have_the_properties_that_the_schema_names_unless_it_says_otherwise() -> None:
    """Values that look like schemas, and parts of `allOf`, stay as they are."""
    inner = {"type": "object", "properties": {"a": {"type": "integer"}}}
    shut = {**inner, "additionalProperties": False}
    free = {**inner, "additionalProperties": {"type": "string"}}
    assert closed({"anyOf": [inner, free], "default": inner, "$defs": {"properties": inner}}) == {
        "anyOf": [shut, free],
        "default": inner,
        "$defs": {"properties": shut},
    }
    assert closed({"properties": {"items": inner}, "enum": [inner]}) == {
        "properties": {"items": shut},
        "enum": [inner],
        "additionalProperties": False,
    }
    assert closed({"allOf": [inner], "properties": {}}) == {"allOf": [inner], "properties": {}}
    assert closed(True) is True


def test_tools_are_refused_with_the_way_out(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match=r"calls no tools.*response_format"):
        served.ask(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])


def test_a_probability_is_reported_also_where_it_is_zero(model: LanguageModel) -> None:
    (score,) = model.names.scored(torch.tensor([[0.0, -200.0]]), [1], 1)
    assert score.logprob == -200.0 and math.isfinite(score.top[0].logprob or 0.0)
