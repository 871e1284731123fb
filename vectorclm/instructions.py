"""Instructions whose following a program can see, in the manner of IFEval (Zhou et al., arXiv 2311.07911).

The prompts and the checks are ours. Every prompt asks for something of the content (words to use or to avoid, a name,
a function, a sentence to repeat), most also for a form (length, list, JSON, letters, first or last words). The two are
counted apart: a form may come by chance from a model that reads nothing, words that are named in the prompt do not.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tokenizers import Tokenizer

from vectorclm.finetune import Turn
from vectorclm.generate import answer, generate
from vectorclm.items import ItemScores
from vectorclm.model import CausalLM
from vectorclm.progress import Progress
from vectorclm.settings import canonical_json
from vectorclm.train_tokenizer import BOS_ID, EOS_ID, IM_END_ID, SPECIAL_TOKENS, encode

MOST = 200  # prompts there are: 25 of each family; fewer are the first of them
SEED = 20_231_114  # of the prompts, whatever the experiment's is: all models are asked the same
ANSWERS = "instructions.jsonl"

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
# What a score looks at: checks of the content, of the form, or both.
PARTS = {"followed_content": (True,), "followed_form": (False,), "followed": (True, False)}
FOLLOWED = {"followed_content": "content", "followed_form": "length and form", "followed": "both"}  # in words


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


class Topic(NamedTuple):
    """What a prompt is about."""

    about: str
    noun: str
    words: tuple[str, str]  # to be used
    obvious: str  # to be avoided, though it comes to mind


TOPICS = tuple(
    Topic(about, noun, (first, second), obvious)
    for about, noun, first, second, obvious in (
        ("the sea", "sea", "salt", "ships", "water"),
        ("a garden in spring", "garden", "seeds", "sunlight", "flowers"),
        ("a cold winter", "winter", "snow", "gloves", "ice"),
        ("the moon", "moon", "night", "tides", "light"),
        ("an old library", "library", "shelves", "silence", "books"),
        ("baking bread", "bread", "flour", "oven", "dough"),
        ("a journey by train", "train", "station", "ticket", "tracks"),
        ("honey bees", "bees", "hive", "pollen", "honey"),
        ("a volcano", "volcano", "lava", "ash", "eruption"),
        ("friendship", "friendship", "trust", "laughter", "friends"),
        ("learning to play music", "music", "rhythm", "drum", "song"),
        ("a rainy day", "day", "clouds", "umbrella", "rain"),
        ("the first day at school", "school", "teacher", "pencil", "students"),
        ("a football match", "match", "goal", "whistle", "team"),
        ("computers", "computers", "keyboard", "memory", "software"),
        ("the desert", "desert", "camel", "dunes", "sand"),
        ("a good breakfast", "breakfast", "eggs", "toast", "coffee"),
        ("a busy market", "market", "fruit", "prices", "people"),
        ("climbing a mountain", "mountain", "valley", "rope", "top"),
        ("a wide river", "river", "bridge", "fish", "water"),
        ("the history of a town", "town", "castle", "war", "past"),
        ("exercise and health", "health", "muscles", "breathing", "body"),
        ("birds in a forest", "birds", "feathers", "nest", "trees"),
        ("a flight into space", "space", "rocket", "astronaut", "stars"),
        ("a small farm", "farm", "tractor", "hens", "animals"),
    )
)
NAMES = ("Max", "Luna", "Oliver", "Sara", "Tom", "Nina", "Felix", "Ruby", "Hugo", "Clara", "Ben", "Mia", "Leo")
ANIMALS = ("dog", "cat", "fox", "rabbit", "horse", "owl", "bear", "mouse", "turtle", "penguin", "goat", "whale")
FUNCTIONS = (
    ("add_numbers", "adds two numbers"),
    ("is_even", "tells whether a number is even"),
    ("reverse_text", "reverses a string"),
    ("count_vowels", "counts the vowels in a string"),
    ("find_largest", "returns the largest number in a list"),
    ("to_fahrenheit", "converts Celsius to Fahrenheit"),
    ("factorial", "computes the factorial of a number"),
    ("unique_items", "removes duplicates from a list"),
    ("sum_of_list", "adds up a list of numbers"),
    ("is_palindrome", "checks whether a word is a palindrome"),
    ("count_words", "counts the words in a text"),
    ("area_of_circle", "computes the area of a circle"),
    ("join_names", "joins a list of names with commas"),
    ("square", "squares a number"),
    ("is_prime", "tells whether a number is prime"),
    ("smallest_item", "returns the smallest item of a list"),
    ("to_upper", "turns a text into capital letters"),
    ("days_between", "returns the days between two dates"),
    ("average", "computes the average of a list"),
    ("sort_words", "sorts words by the alphabet"),
    ("first_letters", "returns the first letter of each word"),
    ("multiply_all", "multiplies all numbers in a list"),
    ("swap_values", "swaps two values"),
    ("remove_spaces", "removes all spaces from a string"),
    ("greet", "returns a greeting for a name"),
)
SENTENCES = (
    "The green boat left the harbour before dawn.",
    "My sister keeps seven marbles in a glass jar.",
    "Nobody heard the clock strike twelve.",
    "Warm soup tastes best after a long walk.",
    "The painter mixed blue and yellow on his plate.",
    "Two red foxes crossed the empty road.",
    "Grandfather reads the newspaper every morning.",
    "A kind word costs nothing at all.",
    "The museum opens at nine on Tuesdays.",
    "She hid the letter under a loose stone.",
    "Our train was late because of the storm.",
    "The baker sells fresh rolls until noon.",
    "He counted the steps up to the tower.",
    "The cat sleeps where the sun shines.",
    "Three candles burned on the kitchen table.",
    "My uncle repairs old radios in his cellar.",
    "The lake was frozen until the end of March.",
    "They painted the fence white on Saturday.",
    "A small bird sat on the broken chair.",
    "The doctor asked him to wait outside.",
    "Every child received an apple and a book.",
    "We lost the map somewhere near the bridge.",
    "The soup was too hot to eat at once.",
    "Her brother plays the trumpet in a band.",
    "The last bus leaves the village at ten.",
)
LAST_WORDS = ("That is all I know.", "I hope this helps.", "And so it ends.")
FIRST_WORDS = ("Here is my answer:", "Let me tell you:", "To begin with,")
JSON_KEYS = (("name", "place"), ("title", "text"), ("subject", "reason"))


FAMILIES = 8  # of contents
WITHOUT_FORM = (6, 7)  # code, and words to repeat


def instructions(count: int) -> list[Instruction]:
    """The first `count` of the prompts, up to MOST: always the same, each another one, kinds by turns."""
    drawn = random.Random(SEED)
    found: dict[str, Instruction] = {}
    while len(found) < min(count, MOST):
        round_, family = divmod(len(found), FAMILIES)
        asked, checks = _content(family, round_, drawn)
        if family not in WITHOUT_FORM and round_ % 4:  # each fourth round asks for content alone
            form, check = _form(drawn)
            asked, checks = f"{asked} {form}", (*checks, check)
        found.setdefault(asked, Instruction(asked, checks))
    return list(found.values())


def _content(family: int, round_: int, drawn: random.Random) -> tuple[str, tuple[Check, ...]]:
    """What to say, and how that is checked."""
    topic, name, animal = drawn.choice(TOPICS), drawn.choice(NAMES), drawn.choice(ANIMALS)
    first, second = topic.words
    match family:
        case 0:
            told = f'Write a short text about {topic.about}. Use the word "{first}".'
            return told, (Check("word", first),)
        case 1:
            told = f'Write a few sentences about {topic.about}. Use the words "{first}" and "{second}".'
            return told, (Check("word", first), Check("word", second))
        case 2:
            told = f'Describe {topic.about}. Use the word "{second}", but never the word "{topic.obvious}".'
            return told, (Check("word", second), Check("avoid", topic.obvious))
        case 3:
            told = f"Write a short story about {'an' if animal[0] in 'aeiou' else 'a'} {animal} named {name}."
            return told, (Check("word", animal), Check("word", name))
        case 4:
            told = f'Tell me about {topic.about}. Use the word "{first}" at least twice.'
            return told, (Check("twice", first),)
        case 5:
            told = f"Write a short letter to {name} about {topic.about}."
            return told, (Check("word", name), Check("word", topic.noun))
        case 6:
            function, does = FUNCTIONS[round_]
            if round_ % 2:
                told = f'Write a Python function that {does}. Use the words "def" and "return".'
                return told, (Check("word", "def"), Check("word", "return"))
            return f"Write a Python function named {function} that {does}.", (Check("function", function),)
        case _:
            return f"Repeat this sentence word for word: {SENTENCES[round_]}", (Check("repeat", SENTENCES[round_]),)


def _form(drawn: random.Random) -> tuple[str, Check]:
    """How to say it, and how that is checked."""
    kind = drawn.choice(list(FORMS))
    told, choices = FORMS[kind]
    what = drawn.choice(choices)
    filled = told.format(*what) if isinstance(what, tuple) else told.format(what)
    return filled, Check(kind, what)


FORMS: dict[Kind, tuple[str, Sequence[Any]]] = {
    "most_words": ("Use at most {} words.", (25, 30, 40)),
    "least_words": ("Use at least {} words.", (30, 40, 50)),
    "sentences": ("Write exactly {} sentences.", (2, 3, 4)),
    "bullets": ('Write it as a list of exactly {} points, each on a line that begins with "- ".', (2, 3, 4)),
    "json": ('Answer with one JSON object that has the keys "{}" and "{}", and nothing else.', JSON_KEYS),
    "capitals": ("Write all of it in capital letters.", ("",)),
    "small_letters": ("Write all of it without capital letters.", ("",)),
    "first_words": ('Begin with these words: "{}"', FIRST_WORDS),
    "last_words": ('End with these words: "{}"', LAST_WORDS),
    "no_commas": ("Do not use any commas.", ("",)),
    "title": ("Give it a title in double angle brackets, such as <<title>>.", ("",)),
    "paragraphs": ("Write exactly {} paragraphs with an empty line between them.", (2, 3)),
}
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


# What a base model reads first. A chat model has its template instead.
SHOTS = (
    (
        Instruction(
            'Write a short text about tea. Use the word "cup". Use at most 30 words.',
            (Check("word", "cup"), Check("most_words", 30)),
        ),
        "Tea is made of dried leaves and hot water. Many people drink a cup of it in the afternoon.",
    ),
    (
        Instruction(
            "Write a short story about a frog named Paul. Write exactly 2 sentences.",
            (Check("word", "frog"), Check("word", "Paul"), Check("sentences", 2)),
        ),
        "Paul was a little frog who wanted to see the other side of the pond. One night he jumped from leaf to leaf "
        "and came home with a new friend.",
    ),
    (
        Instruction(
            "Write a Python function named double that doubles a number.",
            (Check("function", "double"),),
        ),
        "def double(number):\n    return 2 * number",
    ),
    (
        Instruction(
            'Describe a bicycle. Use the word "wheels", but never the word "ride". Write it as a list of exactly 2 '
            'points, each on a line that begins with "- ".',
            (Check("word", "wheels"), Check("avoid", "ride"), Check("bullets", 2)),
        ),
        "- It has two wheels and a chain.\n- It needs no fuel.",
    ),
)
STOP = "\n\nInstruction:"  # where a base model begins another one


def few_shot(tokenizer: Tokenizer, prompt: str, room: int) -> list[int]:
    """Token ids of an instruction after as many of SHOTS as fit with it in `room` tokens; those after it go first."""
    for kept in range(len(SHOTS), -1, -1):
        parts = [f"Instruction: {shot.prompt}\nAnswer: {answer}" for shot, answer in SHOTS[:kept]]
        ids = [BOS_ID, *encode(tokenizer, "\n\n".join([*parts, f"Instruction: {prompt}\nAnswer:"]))]
        if len(ids) <= room:
            return ids
    return [BOS_ID, *ids[1 - room :]]


def chat_answer(model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> tuple[str, bool]:
    """A chat model's likeliest answer to an instruction, and whether it ended its turn."""
    ids = list(answer(model, tokenizer, [Turn("user", prompt)], max_new_tokens))
    text: str = tokenizer.decode([i for i in ids if i >= len(SPECIAL_TOKENS)], skip_special_tokens=False)
    return text, bool(ids) and ids[-1] == IM_END_ID


def base_answer(model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> tuple[str, bool]:
    """A base model's likeliest answer to an instruction in plain text, and whether it ended the text or began another.

    What comes after that is left off.
    """
    context = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, context // 2)
    ids, text = list[int](), ""
    for token in generate(model, few_shot(tokenizer, prompt, context - max_new_tokens), max_new_tokens):
        if token == EOS_ID:
            return text, True
        ids += [token] if token >= len(SPECIAL_TOKENS) else []
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if STOP in text:
            return text[: text.index(STOP)], True
    return text, False


def instruction_scores(
    model: CausalLM,
    tokenizer: Tokenizer,
    asked: Sequence[Instruction],
    max_new_tokens: int,
    *,
    chat: bool,
    out: Path,
    found: ItemScores,
) -> dict[str, Any]:
    """Answer every prompt, and score the answers as `judge` does; `instructions.jsonl` in `out` has them all.

    A chat model answers in its template, a base model after a few examples of instruction and answer in plain text.
    `ended` counts the answers that the model ended itself, the chat model by its end-of-turn token.
    """
    respond = chat_answer if chat else base_answer
    answers, ended = [], 0
    with Progress("follow instructions", len(asked), "prompts") as progress:
        for instruction in asked:
            said, is_over = respond(model, tokenizer, instruction.prompt, max_new_tokens)
            answers.append(said)
            ended += is_over
            progress.advance(1)
    with (out / ANSWERS).open("w", encoding="utf-8") as file:
        for (prompt, checks), said in zip(asked, answers, strict=True):
            verdicts = [{"kind": check.kind, "what": check.what, "holds": holds(check, said)} for check in checks]
            file.write(canonical_json({"prompt": prompt, "answer": said, "checks": verdicts}) + "\n")
    return {**judge(asked, answers, found), "ended": ended, "prompts": len(asked)}


def judge(asked: Sequence[Instruction], answers: Sequence[str], found: ItemScores) -> dict[str, Any]:
    """Of the prompts, the share whose answers are as asked, with its standard error.

    `followed_content` looks at what is said alone, `followed_form` at length and format alone (of the prompts that ask
    for any), `followed` at both. Of a prompt all checks must hold (IFEval's strict accuracy by prompt). `checks` has
    for each kind how many held, and of how many. What each prompt scored is added to `found`.
    """
    scores: dict[str, Any] = {}
    for name, counted in PARTS.items():
        right = []
        for number, (instruction, said) in enumerate(zip(asked, answers, strict=True)):
            if checks := [check for check in instruction.checks if check.is_content in counted]:
                right.append(all(holds(check, said) for check in checks))
                content = canonical_json(instruction).encode()
                found.add_question(name, number, content, (right[-1], None), None, texts=[], part=None)
        if right:
            share = sum(right) / len(right)
            stderr = math.sqrt(share * (1 - share) / max(1, len(right) - 1))
            scores[name] = {"share": share, "stderr": stderr, "items": len(right)}
    kinds: dict[str, list[bool]] = {}
    for instruction, said in zip(asked, answers, strict=True):
        for check in instruction.checks:
            kinds.setdefault(check.kind, []).append(holds(check, said))
    scores["checks"] = {kind: {"held": sum(held), "of": len(held)} for kind, held in sorted(kinds.items())}
    return scores
