"""Vocabulary and sentence templates of the synthetic world: kinds of animals, names, attributes and phrases."""

from typing import NamedTuple


class Attribute(NamedTuple):
    """An attribute of every kind: its verb in the forms that the templates need, and four values."""

    name: str
    verb: str
    plural: str
    question: str
    plural_question: str
    clause: str
    values: tuple[str, str, str, str]
    scenes: tuple[str, ...]


ATTRIBUTES = (
    Attribute(
        "home", "lives", "live", "Where does {} live?", "Where do {} live?", "where {} live",
        ("by the lake", "in the forest", "on the hill", "in the meadow"),
        ("{n} the {k} has a house {v}.", "{n} the {k} went home and slept {v}."),
    ),
    Attribute(
        "food", "eats", "eat", "What does {} eat?", "What do {} eat?", "what {} eat",
        ("honey", "bread", "apples", "soup"),
        ("{n} the {k} put {v} on the table.", "{n} the {k} came home and asked for {v}."),
    ),
    Attribute(
        "hour", "is awake", "are awake", "When is {} awake?", "When are {} awake?", "when {} are awake",
        ("at dawn", "at noon", "at dusk", "at night"),
        ("{n} the {k} gets up {v}.", "{n} the {k} began to work {v}."),
    ),
    Attribute(
        "craft", "makes", "make", "What does {} make?", "What do {} make?", "what {} make",
        ("baskets", "boats", "drums", "lamps"),
        ("{n} the {k} sells {v} at the market.", "{n} the {k} sat down to work on some {v}."),
    ),
    Attribute(
        "colour", "wears", "wear", "Which colour does {} wear?", "Which colour do {} wear?",
        "which colour {} wear",
        ("red", "blue", "green", "white"),
        ("{n} the {k} has a {v} coat.", "{n} the {k} put on a {v} hat."),
    ),
)  # fmt: skip

KINDS = (
    "otter", "owl", "bear", "hare", "mole", "frog", "crow", "goat",
    "duck", "badger", "swan", "toad", "robin", "seal", "mouse", "cat",
)  # fmt: skip
NAMES = (
    "Ada", "Ben", "Cora", "Dan", "Eli", "Fay", "Gus", "Hal", "Ida", "Jon", "Kit", "Lou", "Max", "Nell",
    "Otto", "Pim", "Quin", "Ray", "Sue", "Tess", "Una", "Val", "Wes", "Xena", "Yan", "Zoe", "Abe", "Bea",
    "Cy", "Dot", "Ed", "Flo", "Gil", "Hugo", "Ines", "Jill", "Ken", "Liv", "Mia", "Ned",
)  # fmt: skip

# Questions that introduce an animal: the same in lessons, in chat and in the evaluation.
FORMS = ("{n} is {a}. {q}", "I met {a} called {n}. {q}", "{qk}")

# The answer repeats the kind, so it occurs in no training text when the pair is held out.
ANSWER = "{n} the {k} {verb} {v}."

INTRODUCTIONS = (
    "{n} is {a}.", "There was {a} called {n}.", "In the village there was {a} called {n}.",
    "I met {a} called {n}.",
)  # fmt: skip
FACTS = (ANSWER, ANSWER, "Like all {ks}, {n} {verb} {v}.", '"We {ks} {plural} {v}," said {n}.')
RULES = ("All {ks} {plural} {v}.", "{Ks} {plural} {v}.", "Every {k} {verb} {v}.")
EXAMPLES = (
    "{n} is {a}. All {ks} {plural} {v}. So {n} the {k} {verb} {v}.",
    "If {n} is {a}, then {n} {verb} {v}.",
    "We know that {n} is {a}, so {n} {verb} {v}.",
)

WEATHER = ("sunny", "windy", "cold", "warm", "rainy", "quiet")
OPENINGS = (
    "It was a {w} day in the village.", "One {w} day, the children sat down to hear a story.",
    "This is a story from a {w} day.", "Long ago, on a {w} day, the village had a party.",
)  # fmt: skip
EVENTS = (
    "{n} found an old key on the road.", "{n} walked to the market and sang a song.",
    "{n} lost a button and looked for it the whole day.", "A friend came to the door of {n} with a letter.",
    "The wind took the letter, and {n} ran after it.", "{n} helped a friend to carry a table.",
    "Then the rain came, and {n} waited under a tree.", "{n} told a story, and the children laughed.",
)  # fmt: skip
MEETINGS = (
    "On the road {n} met {m}.", "{n} and {m} were old friends.", "{n} asked {m} to come to the party.",
    "{m} found the key of {n} and gave it back.",
)  # fmt: skip
ENDINGS = (
    "It was a good day.", "They laughed and went home.", "That is the end of the story.",
    "Then the village was quiet.",
)  # fmt: skip

SHORT = ("You are a helpful guide to the village.", "Answer in one short sentence.")
REASON = ("You are a teacher. Give the rule first.", "Think about the rule before you answer.")
THANKS = ("Thank you!", "You are welcome!")
TALK = (
    THANKS,
    ("Hello!", "Hello! Ask me about the animals of the village."),
    ("Who are you?", "I am a guide to the animals of the village."),
    ("How many kinds of animals are there?", "There are sixteen kinds of animals in the village."),
)


def plural(kind: str) -> str:
    """The plural of a kind: "otters"."""
    return {"mouse": "mice"}.get(kind, f"{kind}s")


def article(kind: str) -> str:
    """A kind with its article: "an otter"."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
