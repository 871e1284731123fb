"""Responses of OpenAI's API: chat completions and text completions, whole or as the events of a stream."""

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from vectorclm.inference.logprobs import TokenLogprob

Finish = Literal["stop", "length"] | None


@dataclass
class WholeChoice:
    """One choice of a whole response."""

    text: str
    finish: Finish = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class ResponseBuilder(ABC):
    """Builds the JSON of one response; the subclasses differ in the form of a choice."""

    stream_object: ClassVar[str]
    whole_object: ClassVar[str]
    prefix: ClassVar[str]

    model: str
    fingerprint: str  # of the model's content
    prompt_tokens: int
    usage_in_stream: bool = False  # whether each event has the field `usage`
    usage_so_far: bool = False  # whether that field is filled before the last event
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    tokens: int = 0  # generated so far, by all choices
    offsets: dict[int, int] = field(default_factory=dict)  # characters of each choice's scored tokens so far

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """The event before the first text of a choice, if there is one."""

    @abstractmethod
    def stream_choice(self, text: str, finish: Finish) -> Mapping[str, Any]:
        """The fields of a choice in an event."""

    @abstractmethod
    def whole_choice(self, text: str) -> Mapping[str, Any]:
        """The fields of a choice in a whole response."""

    @abstractmethod
    def scores(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """The log-probabilities of the next tokens of a choice."""

    def event(
        self, index: int, text: str, finish: Finish = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        """One event of a stream."""
        return self._event(index, self.stream_choice(text, finish), finish, logprobs)

    def usage_event(self) -> dict[str, Any]:
        """The last event of a stream, with the tokens used."""
        return {**self._head(self.stream_object), "choices": [], "usage": self.usage()}

    def whole(self, choices: Sequence[WholeChoice]) -> dict[str, Any]:
        """The whole response."""
        rows = [
            {
                "index": index,
                **self.whole_choice(choice.text),
                "logprobs": self.scores(index, choice.logprobs) if choice.logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head(self.whole_object), "choices": rows, "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of the prompts and of the answers, special tokens included."""
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}

    def _event(
        self, index: int, fields: Mapping[str, Any], finish: Finish, logprobs: Sequence[TokenLogprob] = ()
    ) -> dict[str, Any]:
        scores = self.scores(index, logprobs) if logprobs else None
        choice = {"index": index, **fields, "logprobs": scores, "finish_reason": finish}
        usage = {"usage": self.usage() if self.usage_so_far else None} if self.usage_in_stream else {}
        return {**self._head(self.stream_object), "choices": [choice], **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": self.fingerprint}


class ChatResponse(ResponseBuilder):
    """The response of `/v1/chat/completions`."""

    stream_object = "chat.completion.chunk"
    whole_object = "chat.completion"
    prefix = "chatcmpl"

    def opening(self, index: int) -> dict[str, Any]:
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def stream_choice(self, text: str, finish: Finish) -> Mapping[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def whole_choice(self, text: str) -> Mapping[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def scores(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [{**_chat_score(token), "top_logprobs": [_chat_score(one) for one in token.top]} for token in tokens]
        return {"content": content, "refusal": None}


def _chat_score(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}


class TextResponse(ResponseBuilder):
    """The response of `/v1/completions`."""

    stream_object = "text_completion"
    whole_object = "text_completion"
    prefix = "cmpl"

    def opening(self, index: int) -> None:
        return None

    def stream_choice(self, text: str, finish: Finish) -> Mapping[str, Any]:
        return {"text": text}

    def whole_choice(self, text: str) -> Mapping[str, Any]:
        return {"text": text}

    def scores(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self.offsets.get(index, 0))
            self.offsets[index] = offsets[-1] + len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                None if token.logprob is None else {one.text: one.logprob for one in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }
