"""OpenAI's chat completion API: requests, answers and errors as JSON."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ConfigDict, Field, ValidationError

from vectorclm.errors import DataError
from vectorclm.inference.chat import ChatModel, TextDelta, check_turns
from vectorclm.inference.generate import SamplingParams
from vectorclm.settings import Settings
from vectorclm.shards.conversations import Turn, read_conversation, render_prompt

# Options that are not implemented are accepted only with values that ask for nothing.
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": [1],
    "logprobs": [False],
    "presence_penalty": [0],
    "frequency_penalty": [0],
    "logit_bias": [{}],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "tools": [[]],
    "tool_choice": ["none"],
    "functions": [[]],
    "store": [False],
}
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")  # they change no answer
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Refusal(Exception):
    """A refused request, with the fields of an error of the API."""

    def __init__(self, message: str, status: int = 400, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body of the error."""
        kinds = {429: "rate_limit_error", 500: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(Settings):
    """How a stream ends."""

    include_usage: bool = False


class Asked(Settings):
    """The fields of a request that the server knows; sampling options are those of vLLM's API."""

    model_config = ConfigDict(strict=True)

    model: str
    messages: list[Any] = Field(min_length=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] = Field(default_factory=list, max_length=1000)
    stream: bool = False
    stream_options: StreamOptions | None = None


@dataclass(frozen=True)
class Completion:
    """A valid request for an answer."""

    model: str
    fingerprint: str  # of the model's content
    prompt: Sequence[int]  # token ids
    max_new_tokens: int
    sampling: SamplingParams
    stop: Sequence[str]
    stream: bool
    include_usage: bool
    name: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def chunk(self, delta: Mapping[str, str], finish: str | None = None) -> dict[str, Any]:
        """One event of a stream."""
        choice = {"index": 0, "delta": dict(delta), "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def last_chunk(self, tokens: int) -> dict[str, Any]:
        """The last event of a stream, with the tokens used."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(tokens)}

    def whole(self, pieces: Sequence[TextDelta]) -> dict[str, Any]:
        """The whole answer as one object."""
        text = "".join(piece.text for piece in pieces)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": pieces[-1].finish}
        usage = self._usage(sum(piece.tokens for piece in pieces))
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.name, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint}

    def _usage(self, tokens: int) -> dict[str, int]:
        """Tokens of the prompt and of the answer, special tokens included."""
        prompt = len(self.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}


def read_completion(body: bytes, chat_model: ChatModel, name: str) -> Completion:
    """Parse the body of a request to the model of this name. Raises Refusal with the field that is wrong."""
    asked = _read(body)
    check_name(asked.model, name)
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    if len(stop) > 4 or "" in stop:
        raise Refusal("stop takes at most 4 strings, none of them empty", param="stop", code="invalid_value")
    if asked.stream_options is not None and not asked.stream:
        raise Refusal("stream_options needs stream to be true", param="stream_options", code="invalid_value")
    turns = [_turn(place, message) for place, message in enumerate(asked.messages)]
    try:
        check_turns(turns)
    except DataError as error:
        raise Refusal(str(error), param="messages", code="invalid_value") from error
    prompt = render_prompt(chat_model.tokenizer, turns)
    sampling = {key: getattr(asked, key) for key in SamplingParams.model_fields}
    return Completion(
        name,
        f"vc_{chat_model.content[:12]}",
        prompt,
        _room(asked, len(prompt), chat_model.context),
        SamplingParams.model_validate(sampling),
        stop,
        asked.stream,
        asked.stream_options is not None and asked.stream_options.include_usage,
    )


def check_name(asked: str, name: str) -> None:
    """Raise Refusal where a request names another model."""
    if asked != name:
        raise Refusal(f"there is no model {asked!r} here, only {name!r}", 404, param="model", code="model_not_found")


def _read(body: bytes) -> Asked:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON: {error}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise Refusal("the body must be a JSON object", code="invalid_json")
    values = {key: value for key, value in values.items() if value is not None and key not in IGNORED}
    for key, harmless in NEUTRAL.items():
        if values.pop(key, harmless[0]) not in harmless:
            told = json.dumps(harmless[0])
            raise Refusal(f"{key} can only be {told} here", param=key, code="unsupported_parameter")
    try:
        return Asked.model_validate(values)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> Refusal:
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return Refusal(f"Unrecognized request argument supplied: {key}", param=key, code="unknown_parameter")
    if first["type"] == "missing":
        return Refusal(f"{key} is missing", param=key, code="missing_required_parameter")
    return Refusal(f"{key}: {first['msg']}", param=key, code="invalid_value")


def _turn(place: int, message: Any) -> Turn:
    """A message as a turn; text may come in parts, and what else a message can hold must be empty."""
    param = f"messages[{place}]"
    if not isinstance(message, dict):
        raise Refusal(f"{param} must be an object", param=param, code="invalid_type")
    filled = {key: value for key, value in message.items() if value not in (None, [])}
    if unknown := sorted(filled.keys() - {"role", "content"}):
        raise Refusal(f"{param}.{unknown[0]} is not supported here", param=param, code="unsupported_parameter")
    role, content = filled.get("role"), filled.get("content", "")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role", code="invalid_value")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            told = f"{param}.content must be text: pictures, sound and files are not supported here"
            raise Refusal(told, param=f"{param}.content", code="unsupported_value")
    try:
        return read_conversation([{"role": ROLES[role], "content": "".join(part["text"] for part in parts)}], param)[0]
    except DataError as error:
        raise Refusal(str(error), param=f"{param}.content", code="invalid_value") from error


def _room(asked: Asked, prompt: int, context: int) -> int:
    """How long the answer may be: as asked, else as long as the context is."""
    limit = asked.max_completion_tokens or asked.max_tokens
    if prompt + (limit or 1) > context:
        raise Refusal(
            f"This model's maximum context length is {context} tokens, but {prompt} are in the messages and "
            f"{limit or 1} asked for the answer: shorten the messages or the answer",
            param="messages",
            code="context_length_exceeded",
        )
    return limit or context - prompt
