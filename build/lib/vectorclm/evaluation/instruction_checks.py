"""Checks of answers to instructions: a program decides whether content and form are as the prompt asks."""

import json
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

# The checks that a score counts: of the content (True), of the form (False), or both.
PARTS = {"followed_content": (True,), "followed_form": (False,), "followed": (True, False)}
# The scores in words, for tables.
FOLLOWED = {"followed_content": "content", "followed_form": "length and form", "followed": "both"}
Kind = Literal[
    "word",
    "avoid",
    "twice",
    "function",
    "repeat",
    "most_words",
    "least_words",
    "sentences",
    "bullets",
    "json",
    "capitals",
    "small_letters",
    "first_words",
    "last_words",
    "no_commas",
    "title",
    "paragraphs",
]
CONTENT: frozenset[Kind] = frozenset({"word", "avoid", "twice", "function", "repeat"})


class Check(NamedTuple):
    """One requirement of a prompt."""

    kind: Kind
    what: str | int | tuple[str, ...] = ""

    @property
    def is_content(self) -> bool:
        """Whether the check is of the content, not of length or layout."""
        return self.kind in CONTENT


class Instruction(NamedTuple):
    """A prompt and its checks."""

    prompt: str
    checks: tuple[Check, ...]


WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)]*(?=\s|$)")


def holds(check: Check, answer: str) -> bool:
    """Whether an answer meets a check. Words count in upper and lower case; an empty answer meets none."""
    text = answer.strip()
    return bool(text) and CHECKS[check.kind](text, check.what)


def _times(text: str, word: Any) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def _has_sentences(text: str, count: Any) -> bool:
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    return len(ends) == count and ends[-1] == len(text)


def _has_keys(text: str, keys: Any) -> bool:
    """Whether a text is a JSON object with these keys, in a code fence or not."""
    inside = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        value = json.loads(inside[1] if inside else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(keys) <= value.keys()


# Each check of an answer without white space at its ends, and of what the prompt asks for.
CHECKS: dict[Kind, Callable[[str, Any], bool]] = {
    "word": lambda text, word: _times(text, word) >= 1,
    "twice": lambda text, word: _times(text, word) >= 2,
    "avoid": lambda text, word: _times(text, word) == 0,
    "function": lambda text, name: re.search(rf"\bdef\s+{name}\s*\(", text) is not None,
    "repeat": lambda text, sentence: sentence.lower() in " ".join(text.lower().split()),
    "most_words": lambda text, count: len(WORD.findall(text)) <= count,
    "least_words": lambda text, count: len(WORD.findall(text)) >= count,
    "sentences": _has_sentences,
    "bullets": lambda text, count: sum(line.startswith("- ") for line in text.splitlines()) == count,
    "json": _has_keys,
    "capitals": lambda text, _: text.isupper(),
    "small_letters": lambda text, _: text.islower(),
    "first_words": lambda text, words: text.startswith(words),
    "last_words": lambda text, words: text.endswith(words),
    "no_commas": lambda text, _: "," not in text,
    "title": lambda text, _: re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text) is not None,
    "paragraphs": lambda text, count: len(re.split(r"\n\s*\n", text)) == count,
}
