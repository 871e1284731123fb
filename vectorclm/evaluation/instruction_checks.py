"""What an instruction asks for, each thing a check that a program makes of an answer: its content, or its form."""

import json
import re
from typing import Any, Literal, NamedTuple

# What a score looks at: checks of the content, of the form, or both.
PARTS = {"followed_content": (True,), "followed_form": (False,), "followed": (True, False)}


FOLLOWED = {"followed_content": "content", "followed_form": "length and form", "followed": "both"}  # in words


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
    """One thing that a prompt asks for."""

    kind: Kind
    what: str | int | tuple[str, ...] = ""

    @property
    def is_content(self) -> bool:
        """Whether it is of what is said, not of how long it is or how it is laid out."""
        return self.kind in CONTENT


class Instruction(NamedTuple):
    """A prompt and all that it asks for."""

    prompt: str
    checks: tuple[Check, ...]


WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)]*(?=\s|$)")


def holds(check: Check, answer: str) -> bool:
    """Whether an answer is as asked; words count whatever their case, and an empty answer is never as asked."""
    text, what = answer.strip(), check.what
    if not text:
        return False
    match check.kind:
        case "word":
            return _times(str(what), text) >= 1
        case "twice":
            return _times(str(what), text) >= 2
        case "avoid":
            return _times(str(what), text) == 0
        case "function":
            return re.search(rf"\bdef\s+{what}\s*\(", text) is not None
        case "repeat":
            return str(what).lower() in " ".join(text.lower().split())
        case "most_words":
            return len(WORD.findall(text)) <= int(str(what))
        case "least_words":
            return len(WORD.findall(text)) >= int(str(what))
        case "sentences":
            ends = [match.end() for match in SENTENCE_END.finditer(text)]
            return len(ends) == what and ends[-1] == len(text)
        case "bullets":
            return sum(line.startswith("- ") for line in text.splitlines()) == what
        case "json":
            return _has_keys(text, check.what)
        case "capitals":
            return text.isupper()
        case "small_letters":
            return text.islower()
        case "first_words":
            return text.startswith(str(what))
        case "last_words":
            return text.endswith(str(what))
        case "no_commas":
            return "," not in text
        case "title":
            return re.search(r"<<[^<>\n]*\w[^<>\n]*>>", text) is not None
        case "paragraphs":
            return len(re.split(r"\n\s*\n", text)) == what


def _times(word: str, text: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def _has_keys(text: str, keys: Any) -> bool:
    """Whether a text is a JSON object with these keys, in a fence or not."""
    inside = re.fullmatch(r"```(?:json)?\n(.*)\n```", text, re.DOTALL)
    try:
        value = json.loads(inside[1] if inside else text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(keys) <= value.keys()
