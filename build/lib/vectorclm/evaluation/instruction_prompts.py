"""Prompts with instructions that a program can check, built from topics, names and sentences in a fixed order.

Each prompt asks for content (words to use or to avoid, a name, a function, a sentence to repeat), most also for a form
(length, list, JSON, letters, first or last words).
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from vectorclm.evaluation.instruction_checks import Check, Instruction, Kind

MOST = 200  # prompts in all: 25 of each family; a smaller number takes the first of them
SEED = 20_231_114  # of the prompts, for any seed of the experiment: all models are asked the same


class Topic(NamedTuple):
    """The topic of a prompt."""

    about: str
    noun: str
    words: tuple[str, str]  # to be used
    obvious: str  # to be avoided, though it is likely


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
# Examples that a base model reads first; a chat model has its template instead.
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
FAMILIES = 8  # of content
WITHOUT_FORM = (6, 7)  # code, and words to repeat


def instructions(count: int) -> list[Instruction]:
    """The first `count` of the prompts, up to MOST: always the same ones, all different, families in turn."""
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
    """A prompt for content, with its checks."""
    topic, name, animal = drawn.choice(TOPICS), drawn.choice(NAMES), drawn.choice(ANIMALS)
    first, second = topic.words
    match family:
        case 0:
            prompt = f'Write a short text about {topic.about}. Use the word "{first}".'
            return prompt, (Check("word", first),)
        case 1:
            prompt = f'Write a few sentences about {topic.about}. Use the words "{first}" and "{second}".'
            return prompt, (Check("word", first), Check("word", second))
        case 2:
            prompt = f'Describe {topic.about}. Use the word "{second}", but never the word "{topic.obvious}".'
            return prompt, (Check("word", second), Check("avoid", topic.obvious))
        case 3:
            prompt = f"Write a short story about {'an' if animal[0] in 'aeiou' else 'a'} {animal} named {name}."
            return prompt, (Check("word", animal), Check("word", name))
        case 4:
            prompt = f'Tell me about {topic.about}. Use the word "{first}" at least twice.'
            return prompt, (Check("twice", first),)
        case 5:
            prompt = f"Write a short letter to {name} about {topic.about}."
            return prompt, (Check("word", name), Check("word", topic.noun))
        case 6:
            function, does = FUNCTIONS[round_]
            if round_ % 2:
                prompt = f'Write a Python function that {does}. Use the words "def" and "return".'
                return prompt, (Check("word", "def"), Check("word", "return"))
            return f"Write a Python function named {function} that {does}.", (Check("function", function),)
        case _:
            return f"Repeat this sentence word for word: {SENTENCES[round_]}", (Check("repeat", SENTENCES[round_]),)


def _form(drawn: random.Random) -> tuple[str, Check]:
    """A request for a form, with its check."""
    kind = drawn.choice(list(FORMS))
    form, choices = FORMS[kind]
    what = drawn.choice(choices)
    filled = form.format(*what) if isinstance(what, tuple) else form.format(what)
    return filled, Check(kind, what)
