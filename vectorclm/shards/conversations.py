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


# SmolTalk and Tulu-3 write {role, content}; SlimOrca writes {from, value}. Capital letters do not matter.
ROLES: Mapping[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
KEYS = (("role", "content"), ("from", "value"))
# Allowed successors: an optional system turn, then user and assistant alternate.
FOLLOWS = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


class MalformedConversationError(DataError):
    """A row that is not a conversation; `reason` is the name under which such rows are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_conversation(turns: Any, where: str) -> list[Turn]:
    """Read a row's turns in any of the three schemas.

    A turn's text may be a list of parts that are all text. A table of lists, as `datasets` stores a sequence of tables,
    is read as well. Raises MalformedConversationError, naming `where`, for another schema, an unknown role or a content
    that is not valid text.
    """
    if isinstance(turns, Mapping):
        turns = _turns_of_lists(turns)
    return [_turn(turn, where) for turn in (turns if isinstance(turns, list | tuple) else [turns])]


def _turns_of_lists(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The turns in a table of lists, one list for each key; a table of single values is one turn."""
    lists = {name: values for name, values in table.items() if isinstance(values, list | tuple)}
    if not any(isinstance(table.get(role), list | tuple) for role, _ in KEYS):
        return [table]
    return [
        {name: values[number] if number < len(values) else None for name, values in lists.items()}
        for number in range(max(map(len, lists.values())))
    ]


def _turn(turn: Any, where: str) -> Turn:
    # A column that joins two schemas has null where a row lacks a key, so the value decides.
    keys = [pair for pair in KEYS if isinstance(turn, Mapping) and pair[0] in turn and pair[1] in turn]
    if not keys:
        raise MalformedConversationError(
            "not_a_conversation",
            f"{where}: a turn must hold role and content, or from and value; found {turn!r:.200}",
        )
    role, content = next(((turn[r], turn[c]) for r, c in keys if turn[r] is not None), (None, None))
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    text = _joined_parts(content) if isinstance(content, list | tuple) else content
    if known is None or not isinstance(text, str):
        raise MalformedConversationError(
            "unknown_role" if known is None else "not_text",
            f"{where}: role must be one of {', '.join(ROLES)} and the text a string; found {turn!r:.200}",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MalformedConversationError(
            "invalid_utf8", f"{where}: a lone surrogate at character {error.start}: fix the text"
        ) from error
    return Turn(known, text)


def _joined_parts(parts: Sequence[Any]) -> str | None:
    """The text of a content in parts, as chat APIs have it; None where a part is not text."""
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type", "text") == "text"]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if len(found) == len(parts) else None


def without_empty_system(turns: Any) -> Any:
    """The turns of a row without a first system turn that is empty or null, which says nothing to learn."""
    if isinstance(turns, Mapping):
        turns = _turns_of_lists(turns)
    if not isinstance(turns, list | tuple) or not turns or not isinstance(turns[0], Mapping):
        return turns
    for role, content in KEYS:
        named, text = turns[0].get(role), turns[0].get(content)
        if isinstance(named, str) and ROLES.get(named.lower()) == "system" and (text is None or _is_blank(text)):
            return list(turns[1:])
    return turns


def _is_blank(text: Any) -> bool:
    return isinstance(text, str) and not text.strip()


def find_fault(conversation: Sequence[Turn]) -> tuple[str, str] | None:
    """The fault in the turns (`empty_turn`, `nul` or `role_order`) and its place; None where there is none."""
    before = None
    for number, turn in enumerate(conversation):
        if "\0" in turn.content:
            return "nul", f"turn {number}, the {turn.role}'s, has the character NUL"
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
