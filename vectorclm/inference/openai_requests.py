"""Requests of OpenAI's API: chat completions and text completions, validated and tokenized."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llguidance import LLMatcher
from pydantic import Field, model_validator
from tokenizers import Tokenizer

from vectorclm.errors import DataError
from vectorclm.inference.chat import LanguageModel, check_turns
from vectorclm.inference.config import SamplingParams
from vectorclm.inference.openai_errors import Refusal
from vectorclm.inference.openai_format import RequestModel, ResponseFormat, json_object
from vectorclm.shards.conversations import Turn, read_conversation, render_prompt
from vectorclm.tokenizer import BOS_ID, encode

CHOICES = 128  # of one request, at most
TOP_LOGPROBS = 20  # beside one token, at most
PIECE = 4096  # characters that are encoded at once while a long text is measured
SLACK = 16  # tokens that a cut between two pieces may add
# Fields that change no answer: hints, labels, and orders about what OpenAI stores.
IGNORED = frozenset(
    {
        "cache_prompt",
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
# Options that are not implemented are accepted only with values that ask for nothing.
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "best_of": [1],
    "min_tokens": [0],
    "length_penalty": [1],
    "use_beam_search": [False],
    "early_stopping": [False],
    "stop_token_ids": [[]],
    "include_stop_str_in_output": [False],
    "skip_special_tokens": [True],
    "spaces_between_special_tokens": [True, False],
}
TOOLS = ("tools", "tool_choice", "functions", "function_call")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class Choice:
    """One answer to generate."""

    prompt: Sequence[int]  # token ids
    max_new_tokens: int
    sampling: SamplingParams
    stop: Sequence[str]
    ignore_eos: bool = False
    echo: str = ""  # text that precedes the answer
    logprobs: int | None = None  # so many of the likeliest tokens are reported beside each token; None: no scores
    scores_prompt: bool = False  # whether the tokens of the prompt are scored, too
    grammar: LLMatcher | None = None  # that the answer keeps to


@dataclass(frozen=True)
class Generation:
    """A valid request: the answers to generate, and the form of the response."""

    choices: Sequence[Choice]
    prompt_tokens: int
    stream: bool
    include_usage: bool
    continuous_usage: bool


class StreamOptions(RequestModel):
    """Options of a stream."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: the usage so far in each event
    include_obfuscation: bool = False  # padding against an observer of encrypted traffic; changes no answer


class GenerationRequest(RequestModel):
    """The fields that both kinds of completion share; sampling options are those of vLLM's API."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = NEUTRAL

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1, le=CHOICES)
    stop: str | list[str] = Field(default_factory=list, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        """Leave out fields that change nothing. Raises Refusal for options that would change something."""
        values = {key: value for key, value in json_object(values).items() if value is not None and key not in IGNORED}
        for key, harmless in cls.neutral.items():
            if values.pop(key, harmless[0]) not in harmless:
                raise Refusal(_why_not(key, harmless), param=key, code="unsupported_parameter")
        return values

    def stop_strings(self) -> list[str]:
        """The texts that end an answer. Raises Refusal for too many, or an empty one."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stop) > 4 or "" in stop:
            raise Refusal("stop takes at most 4 strings, none of them empty", param="stop", code="invalid_value")
        return stop

    def sampling(self, choice: int) -> SamplingParams:
        """The sampling parameters of one of several choices; each has a seed of its own."""
        values = {key: getattr(self, key) for key in SamplingParams.model_fields}
        values["top_k"] = max(0, self.top_k)  # -1 means all, too
        if self.seed is not None:
            values["seed"] = (self.seed + choice + 2**63) % 2**64 - 2**63
        return SamplingParams.model_validate(values)

    def generation(self, prompts: Sequence[Sequence[int]], limit: int | None, model: LanguageModel) -> Generation:
        """The answers to these prompts. Raises Refusal where an option is wrong, or a prompt fills the context."""
        if self.stream_options is not None and not self.stream:
            raise Refusal("stream_options needs stream to be true", param="stream_options", code="invalid_value")
        if len(prompts) * self.n > CHOICES:
            raise Refusal(f"a request can have at most {CHOICES} choices", param="n", code="invalid_value")
        stop, options = self.stop_strings(), self.stream_options or StreamOptions()
        choices: list[Choice] = []
        for prompt in prompts:
            room = model.context - len(prompt)
            length = room if limit is None else min(limit, room)
            for _ in range(self.n):
                choices.append(Choice(prompt, length, self.sampling(len(choices)), stop, self.ignore_eos))
        return Generation(
            choices,
            sum(map(len, prompts)),
            self.stream,
            options.include_usage,
            options.include_usage and options.continuous_usage_stats,
        )


class ChatRequest(GenerationRequest):
    """A request to `/v1/chat/completions`."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        **NEUTRAL,
        "modalities": [["text"]],
        "tools": [[]],
        "tool_choice": ["none", "auto"],
        "functions": [[]],
        "function_call": ["none", "auto"],
        "add_generation_prompt": [True],
        "continue_final_message": [False],
        "echo": [False],
    }

    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=TOP_LOGPROBS)
    response_format: ResponseFormat | None = None

    def read(self, model: LanguageModel) -> Generation:
        """The answers to generate. Raises Refusal with the field that is wrong."""
        if not model.chat:
            raise Refusal(
                f"{self.model} is a base model, which never ends a turn: use /v1/completions",
                param="model",
                code="unsupported_model",
            )
        turns = join_system([_turn(place, message) for place, message in enumerate(self.messages)])
        try:
            check_turns(turns)
        except DataError as error:
            raise Refusal(str(error), param="messages", code="invalid_value") from error
        check_length(model, (turn.content for turn in turns), "messages")
        prompt = render_prompt(model.tokenizer, turns)
        check_room(model, len(prompt), "messages")
        if self.top_logprobs and not self.logprobs:
            raise Refusal("top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
        generation = self.generation([prompt], self.max_completion_tokens or self.max_tokens, model)
        logprobs = self.top_logprobs if self.logprobs else None
        grammar = None if self.response_format is None else self.response_format.grammar(model)
        choices = [replace(choice, logprobs=logprobs, grammar=grammar) for choice in generation.choices]
        return replace(generation, choices=choices)


class TextRequest(GenerationRequest):
    """A request to `/v1/completions`: texts, or token ids, to continue."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        **NEUTRAL,
        "suffix": [""],
        "add_special_tokens": [True],
    }

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=0)  # OpenAI's default; 0 with `echo` alone
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=TOP_LOGPROBS)

    def read(self, model: LanguageModel) -> Generation:
        """The answers to generate. Raises Refusal with the field that is wrong."""
        given: list[Any] = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        if given and isinstance(given[0], int):
            given = [given]
        if not 0 < len(given) <= CHOICES:
            raise Refusal(f"a request can have 1 to {CHOICES} prompts", param="prompt", code="invalid_value")
        prompts = [self._prompt(model, one) for one in given]
        if self.max_tokens == 0 and not self.echo:
            raise Refusal("max_tokens can be 0 with echo only", param="max_tokens", code="invalid_value")
        generation = self.generation(prompts, self.max_tokens, model)
        choices = [replace(choice, logprobs=self.logprobs) for choice in generation.choices]
        if self.echo:
            texts = [one if isinstance(one, str) else _decode(model.tokenizer, one) for one in given]
            scores = self.logprobs is not None
            choices = [
                replace(choice, echo=texts[place // self.n], scores_prompt=scores)
                for place, choice in enumerate(choices)
            ]
        return replace(generation, choices=choices)

    def _prompt(self, model: LanguageModel, given: str | list[int]) -> list[int]:
        if isinstance(given, str):
            _check_unicode(given)
            check_length(model, [given], "prompt")
            prompt = [BOS_ID, *encode(model.tokenizer, given)]
        else:
            prompt = given
            if not prompt or not all(0 <= i < model.model.config.vocab_size for i in prompt):
                size = model.model.config.vocab_size
                raise Refusal(f"token ids must be 0 to {size - 1}", param="prompt", code="invalid_value")
        check_room(model, len(prompt), "prompt")
        return prompt


def _why_not(key: str, harmless: Sequence[Any]) -> str:
    if key in TOOLS:
        return f"{key}: this server calls no tools; leave the field out, or ask for JSON with response_format"
    return f"{key} can only be {json.dumps(harmless[0])} here"


def check_name(asked: str, name: str) -> None:
    """Raise Refusal where a request names another model."""
    if asked != name:
        raise Refusal(f"there is no model {asked!r} here, only {name!r}", 404, param="model", code="model_not_found")


def check_length(model: LanguageModel, texts: Iterable[str], param: str) -> None:
    """Raise Refusal for texts that are much longer than the context, without encoding all of them."""
    tokens = 0
    for text in texts:
        for start in range(0, len(text), PIECE):
            tokens += max(0, len(encode(model.tokenizer, text[start : start + PIECE])) - SLACK)
            if tokens >= model.context:
                raise _too_long(model, f"more than {model.context}", param)


def check_room(model: LanguageModel, tokens: int, param: str) -> None:
    """Raise Refusal where a prompt of so many tokens leaves no room for an answer."""
    if tokens >= model.context:
        raise _too_long(model, str(tokens), param)


def _too_long(model: LanguageModel, tokens: str, param: str) -> Refusal:
    return Refusal(
        f"This model's maximum context length is {model.context} tokens, but {tokens} are in the {param}, and the "
        f"answer needs at least 1: shorten the {param}",
        param=param,
        code="context_length_exceeded",
    )


def join_system(turns: Sequence[Turn]) -> list[Turn]:
    """Join the system messages into the first turn, with an empty line between: the chat template has one."""
    system = [turn for turn in turns if turn.role == "system"]
    if any(not turn.content.strip() for turn in system):
        raise Refusal("a system message is empty", param="messages", code="invalid_value")
    joined = [Turn("system", "\n\n".join(turn.content for turn in system))] if system else []
    return [*joined, *(turn for turn in turns if turn.role != "system")]


def _turn(place: int, message: Any) -> Turn:
    """A message as a turn; its text may come in parts, its name is left out, and other fields must be empty."""
    param = f"messages[{place}]"
    if not isinstance(message, dict):
        raise Refusal(f"{param} must be an object", param=param, code="invalid_type")
    filled = {key: value for key, value in message.items() if value not in (None, []) and key != "name"}
    if unknown := sorted(filled.keys() - {"role", "content"}):
        raise Refusal(f"{param}.{unknown[0]} is not supported here", param=param, code="unsupported_parameter")
    role, content = filled.get("role"), filled.get("content", "")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role", code="invalid_value")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise Refusal(
                f"{param}.content must be text: pictures, sound and files are not supported here",
                param=f"{param}.content",
                code="unsupported_value",
            )
    try:
        return read_conversation([{"role": ROLES[role], "content": "".join(part["text"] for part in parts)}], param)[0]
    except DataError as error:
        raise Refusal(str(error), param=f"{param}.content", code="invalid_value") from error


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"prompt: a lone surrogate at character {error.start}: fix the text"
        raise Refusal(message, param="prompt", code="invalid_value") from error


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text
