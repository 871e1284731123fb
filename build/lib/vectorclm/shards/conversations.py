"""Reads conversations in three chat schemas, and renders them to tokens with a loss mask for assistant turns."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer

from vectorclm.errors import DataError
from vectorclm.tokenizer import BOS_ID, IM_END_ID, IM_START_ID, encode


class Turn(NamedTuple):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class Fitted(NamedTuple):
    """The part of a conversation that fits in a window."""

    turns: list[Turn]
    ids: list[int]
    supervised: list[bool]


# SmolTalk and Tulu-3 write {role, content}; SlimOrca writes {from, value}.
ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
# Allowed successors: an optional system turn, then user and assistant alternate.
FOLLOWS = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


def read_conversation(turns: Any, where: str) -> list[Turn]:
    """Read a row's turns in any of the three schemas.

    Raises DataError, naming `where`, for another schema, an unknown role or a content that is not valid text.
    """
    conversation = []
    for turn in turns if isinstance(turns, list | tuple) else [turns]:
        if not isinstance(turn, Mapping) or not (
            {"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()
        ):
            raise DataError(f"{where}: a turn must hold role and content, or from and value; found {turn!r:.200}")
        role, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: role must be one of {', '.join(ROLES)} and the text a string; found {turn!r:.200}"
            )
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: a lone surrogate at character {error.start}: fix the text") from error
        conversation.append(Turn(ROLES[role], content))
    return conversation


def find_fault(conversation: Sequence[Turn]) -> tuple[str, str] | None:
    """The fault in the turns (`empty_turn` or `role_order`) and its place; None where there is none."""
    before = None
    for number, turn in enumerate(conversation):
        if not turn.content.strip():
            return "empty_turn", f"turn {number}, the {turn.role}'s, is empty"
        if turn.role not in FOLLOWS[before]:
            place = f"after the {before}'s" if before else "first"
            return "role_order", f"turn {number}, the {turn.role}'s, stands {place}: {turn.content!r:.200}"
        before = turn.role
    return None


def render(tokenizer: Tokenizer, conversation: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the chat template, and a mask of the tokens that carry loss.

    Only the assistant's words and the end-of-turn token after them carry loss. Special tokens written in messages are
    encoded as ordinary text.
    """
    return _joined([_render_turn(tokenizer, turn) for turn in conversation])


def _render_turn(tokenizer: Tokenizer, turn: Turn) -> tuple[list[int], list[bool]]:
    if turn.role == "assistant":
        head, body = [IM_START_ID, *encode(tokenizer, "assistant\n")], [*encode(tokenizer, turn.content), IM_END_ID]
    else:
        head, body = [IM_START_ID, *encode(tokenizer, f"{turn.role}\n{turn.content}"), IM_END_ID], []
    newline = encode(tokenizer, "\n")
    return head + body + newline, [False] * len(head) + [True] * len(body) + [False] * len(newline)


def _joined(turns: Iterable[tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
    ids, supervised = [BOS_ID], [False]
    for turn_ids, turn_supervised in turns:
        ids += turn_ids
        supervised += turn_supervised
    return ids, supervised


def render_prompt(tokenizer: Tokenizer, conversation: Sequence[Turn]) -> list[int]:
    """Token ids of a conversation up to the start of the assistant's next answer."""
    ids, _ = render(tokenizer, conversation)
    return [*ids, IM_START_ID, *encode(tokenizer, "assistant\n")]


def fit(tokenizer: Tokenizer, conversation: Sequence[Turn], length: int) -> Fitted | str:
    """Shorten a conversation to at most `length` tokens. Returns `no_assistant` or `too_long` where that is impossible.

    Turns after the last answer are removed, because they carry no loss. From a conversation that is too long, the
    first questions and their answers are removed, as few as possible. The system turn is kept where the last question
    and answer leave room for it. A conversation whose last question and answer do not fit is `too_long`.
    """
    answers = [number for number, turn in enumerate(conversation) if turn.role == "assistant"]
    if not answers:
        return "no_assistant"
    turns = list(conversation[: answers[-1] + 1])
    rendered = [_render_turn(tokenizer, turn) for turn in turns]
    sizes = [len(ids) for ids, _ in rendered]
    system = int(turns[0].role == "system")
    # The candidates, longest first: with the system turn, then without it.
    for first in range(system, -1, -1):
        for start in (number for number in range(system, len(turns)) if turns[number].role == "user"):
            if 1 + sum(sizes[:first]) + sum(sizes[start:]) <= length:  # 1 for BOS
                ids, supervised = _joined(rendered[:first] + rendered[start:])
                return Fitted(turns[:first] + turns[start:], ids, supervised)
    return "too_long"
