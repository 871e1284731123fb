"""Settings of shards: windows of documents and of conversations, and the mix of their sources."""

from typing import Literal, Self

from pydantic import Field, model_validator

from vectorclm.corpus.sources import Source, check_labels
from vectorclm.settings import LARGEST_WEIGHT, Settings

SPLITS = ("train", "validation")
MIX_BLOCK = 1024  # windows; at the end of each mix block, the mix of a phase is exact

Packing = Literal["best_fit", "concatenate"]
WhenExhausted = Literal["stop", "repeat", "renormalise"]


class ShardsConfig(Settings):
    """Window length, shard size and packing of training documents."""

    sequence_length: int = Field(ge=8, le=65_536, description="Tokens in a window")
    shard_bytes: int = Field(default=64 * 1024 * 1024, ge=4096, description="Size of a shard file")
    packing: Packing = Field(
        default="best_fit",
        description="best_fit keeps documents that fit whole, concatenate cuts them where a window ends",
    )


class ChatSource(Source):
    """A source of conversations."""

    column: str = Field(default="messages", description="Column with the turns")
    conversations: int = Field(gt=0, description="Conversations to draw, at most")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=LARGEST_WEIGHT,
        exclude_if=lambda weight: weight == 1,
        description="Share of chat.tokens, relative to the other sources",
    )


class ChatConfig(Settings):
    """Conversations for instruction tuning, and how they are packed."""

    sources: list[ChatSource] = Field(min_length=1)
    tokens: int = Field(
        default=0,
        ge=0,
        exclude_if=lambda tokens: tokens == 0,
        description="Training tokens, divided among the sources by weight; each source then has its own windows. "
        "0 = all drawn conversations, packed together",
    )
    sequence_length: int = Field(ge=8, description="Tokens in a window of packed conversations")
    validation_share: float = Field(default=0.01, gt=0, lt=0.5, description="Share of conversations held out")
    shuffle_buffer: int = Field(default=10_000, ge=1, description="Conversations held in memory for shuffling")
    packing: Packing = Field(
        default="best_fit", description="best_fit keeps conversations whole, concatenate cuts them where a window ends"
    )
    malformed: Literal["refuse", "drop"] = Field(
        default="refuse",
        description="On a row that is no conversation (an empty turn, roles unknown or out of order, no text): stop "
        "with an error, or drop and count it",
    )

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        check_labels(self.sources)
        return self

    def budget(self, source: ChatSource) -> int | None:
        """Training tokens of a source; None = all."""
        return round(self.tokens * source.weight / sum(s.weight for s in self.sources)) if self.tokens else None
