"""Synthetic data for runs without a network: stories, lessons, conversations and questions of a generated world.

Sixteen kinds of animals live in a village. Every kind has five attributes (home, food, hour, craft, colour) with
four values each. A rule for a kind holds for each of its animals: "Pim is an otter" and "all otters live by the lake"
answer "Where does Pim live?", although no text contains this sentence.

The table of kinds and values is an orthogonal array of strength 2 (C. R. Rao, 1947): every pair of values of
two attributes belongs to exactly one kind, so no attribute predicts another, and four kinds share a value.

For every name, one value of one attribute is held out (Pim: living by the lake). No training text gives the
name to any of the four kinds that have this value; the questions ask about these (name, kind) pairs.
The other twelve kinds (75 %) occur with the name in training.

`questions` introduce one animal, so counting which words occur together answers them. `two-step-questions` introduce
two: "Pim is an otter. Ed is a frog. What does Pim eat?" The model must find Pim's kind in the question, then the food
of this kind. Counting cannot do the first step, for each kind goes equally well with its own value.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import permutations, product
from typing import Any, NamedTuple

from pydantic import Field

from vectorclm.corpus.counting import words_of
from vectorclm.corpus.world_phrases import (
    ANSWER,
    ATTRIBUTES,
    ENDINGS,
    EVENTS,
    EXAMPLES,
    FACTS,
    FORMS,
    INTRODUCTIONS,
    KINDS,
    MEETINGS,
    NAMES,
    OPENINGS,
    REASON,
    RULES,
    SHORT,
    TALK,
    THANKS,
    WEATHER,
    Attribute,
    article,
    plural,
)
from vectorclm.errors import ConfigError
from vectorclm.settings import Settings

CHATS = ("chat-messages", "chat-turns", "chat-code")
QUESTIONS = ("questions", "two-step-questions")
WORLD_SETS = ("stories", "lessons", *CHATS, *QUESTIONS)


class WorldConfig(Settings):
    """Size of the generated world."""

    seed: int = Field(default=0, description="Seed of the table of kinds, the held-out pairs, and every text")
    names: int = Field(default=40, ge=20, le=40, multiple_of=20, description="Names in use, each with 12 questions")
    documents: int = Field(default=4000, ge=1, description="Documents in each of the two styles, stories and lessons")
    conversations: int = Field(default=1500, ge=1, description="Conversations in each of the three chat sets")


class Pair(NamedTuple):
    """An animal: a name given to a kind."""

    name: str
    kind: str


class World:
    """The table of one seed: the attributes of each kind, and the (name, kind) pairs held out of training texts."""

    def __init__(self, config: WorldConfig) -> None:
        rng = random.Random(f"{config.seed}/world")
        kinds = rng.sample(KINDS, len(KINDS))
        self.names = rng.sample(NAMES[: config.names], config.names)
        cells = [(row, column) for row in range(4) for column in range(4)]
        self.table = {kind: _orthogonal(*cell) for kind, cell in zip(kinds, cells, strict=True)}
        # each value is held out for equally many names: the questions are balanced by design
        self.held = {name: (i % 5, i // 5 % 4) for i, name in enumerate(self.names)}
        self._unseen = {
            name: {kind for kind in KINDS if self.table[kind][attribute] == value}
            for name, (attribute, value) in self.held.items()
        }

    def value(self, kind: str, attribute: Attribute) -> str:
        """The value of an attribute for `kind`, such as "by the lake"."""
        return attribute.values[self.table[kind][ATTRIBUTES.index(attribute)]]

    def held_out(self) -> list[Pair]:
        """The pairs that occur only in questions: four kinds for every name."""
        return [Pair(name, kind) for name in self.names for kind in KINDS if kind in self._unseen[name]]

    def cast(
        self, rng: random.Random, size: int, kinds: Sequence[str] = KINDS, mentioned: Iterable[str] = ()
    ) -> list[Pair]:
        """Draw `size` animals with different names and kinds out of `kinds`, for a text that also mentions `mentioned`.

        No name of the text is held out with any kind in the text. For a size up to 4 there is always such a cast:
        two kinds share only one value, so some name and some kind remain.
        """
        pairs: list[Pair] = []
        present = set(mentioned)
        while len(pairs) < size:
            pair = Pair(rng.choice(self.names), rng.choice(kinds))
            fresh = all(pair.name != other.name and pair.kind != other.kind for other in pairs)
            seen = present | {pair.kind}
            if fresh and not any(self._unseen[other.name] & seen for other in [*pairs, pair]):
                pairs.append(pair)
                present = seen
        return pairs

    def fill(self, template: str, pair: Pair, attribute: Attribute) -> str:
        """Fill `template`: n name, k kind, ks, Ks its plural, a "an otter", v value, q, qk questions."""
        name, kind = pair
        return template.format(
            n=name, k=kind, ks=plural(kind), Ks=plural(kind).capitalize(), a=article(kind),
            verb=attribute.verb, plural=attribute.plural, v=self.value(kind, attribute),
            q=attribute.question.format(name), qk=attribute.question.format(f"{name} the {kind}"),
        )  # fmt: skip

    def answer(self, pair: Pair, attribute: Attribute) -> str:
        """The sentence that answers a question: "Pim the otter lives by the lake."."""
        return self.fill(ANSWER, pair, attribute)


def _orthogonal(x: int, y: int) -> tuple[int, ...]:
    """Row (x, y) of the array: x, y and y + m x for m = 1, 2, 3 over GF(4), whose addition is xor."""
    times = ((0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2))
    return (x, y, *(y ^ product[x] for product in times))


@cache
def rows(config: WorldConfig, name: str) -> list[dict[str, Any]]:
    """Generate the rows of one set of WORLD_SETS, in the schema of a hub data set that it can stand in for.

    `stories` has the columns of Cosmopedia, `lessons` of FineWeb-Edu, `chat-messages` of SmolTalk, `chat-turns` of
    SlimOrca, `chat-code` of Tulu 3's code. Questions have context, four choices (each with a leading space) and answer
    (the index of the correct choice). Token counts are word counts, as there is no tokenizer yet; scores are 0. Raises
    ConfigError for any other name. The rows are cached for pinning, checking and sampling: do not change them.
    """
    makers = {
        "stories": _story,
        "lessons": _lesson,
        **dict(zip(CHATS, (_chat_messages, _chat_turns, _code), strict=True)),
    }
    world, rng = World(config), random.Random(f"{config.seed}/{name}")
    if name in QUESTIONS:
        return (_questions if name == "questions" else _two_step_questions)(world, rng)
    if name not in makers:
        raise ConfigError(f"the world has no set {name!r}: choose one of {', '.join(WORLD_SETS)}")
    count = config.documents if name in ("stories", "lessons") else config.conversations
    return [makers[name](world, rng, index) for index in range(count)]


def texts(row: Mapping[str, Any]) -> list[str]:
    """The strings of a row that a model reads: its text, its turns, or its context and choices."""
    if "text" in row:
        return [row["text"]]
    if "context" in row:
        return [row["context"], *row["choices"]]
    return [turn.get("content") or turn["value"] for turn in row.get("messages") or row["conversations"]]


def world_documents(config: WorldConfig) -> list[str]:
    """The text of every story and lesson."""
    return [row["text"] for name in ("stories", "lessons") for row in rows(config, name)]


def words(config: WorldConfig) -> list[str]:
    """The world's whole vocabulary, in lower case and sorted: 251 words for the default settings."""
    found: set[str] = set()
    for name in WORLD_SETS:
        for row in rows(config, name):
            found.update(word for text in texts(row) for word in words_of(text))
    return sorted(found)


def held_out_prompts(config: WorldConfig) -> list[dict[str, str]]:
    """Chat prompts about held-out pairs, in seeded order, each with the sentence that answers it."""
    world = World(config)
    prompts = [
        {"prompt": world.fill(form, pair, attribute), "answer": world.answer(pair, attribute)}
        for pair, attribute in _held_out_facts(world)
        for form in FORMS
    ]
    random.Random(f"{config.seed}/prompts").shuffle(prompts)
    return prompts


def _held_out_facts(world: World) -> list[tuple[Pair, Attribute]]:
    return [(pair, ATTRIBUTES[world.held[pair.name][0]]) for pair in world.held_out()]


def _questions(world: World, rng: random.Random) -> list[dict[str, Any]]:
    """All held-out facts in all forms. For each value, each position has the correct choice equally often."""
    found, asked = [], Counter[tuple[str, str]]()
    for pair, attribute in _held_out_facts(world):
        right = world.value(pair.kind, attribute)
        for form in FORMS:
            place = asked[attribute.name, right] % 4
            asked[attribute.name, right] += 1
            values = [value for value in attribute.values if value != right]
            rng.shuffle(values)
            values.insert(place, right)
            found.append({
                "context": f"Question: {world.fill(form, pair, attribute)}\nAnswer:",
                "choices": [f" {pair.name} the {pair.kind} {attribute.verb} {value}." for value in values],
                "answer": place,
            })  # fmt: skip
    rng.shuffle(found)
    return found


def _two_step_questions(world: World, rng: random.Random) -> list[dict[str, Any]]:
    """Questions that introduce two animals, of two kinds held out with the name that is asked about.

    The choices combine both kinds with both values. Position and order of the animals say nothing of the answer.
    """
    found: list[dict[str, Any]] = []
    for name in world.names:
        kinds = [held.kind for held in world.held_out() if held.name == name]
        asked = [attribute for place, attribute in enumerate(ATTRIBUTES) if place != world.held[name][0]]
        for pair in permutations(kinds, 2):
            place, attribute = len(found) % 4, rng.choice(asked)
            pairs = [Pair(name, pair[0]), Pair(rng.choice([n for n in world.names if n != name]), pair[1])]
            question = _introduced(pairs if len(found) // 4 % 2 else pairs[::-1], world, pairs[0], attribute)
            both = [(said, world.value(kind, attribute)) for said, kind in product(pair, pair)]
            right, *wrong = (f" {name} the {said} {attribute.verb} {value}." for said, value in both)
            choices = rng.sample(wrong, 3)
            choices.insert(place, right)
            found.append({"context": f"Question: {question}\nAnswer:", "choices": choices, "answer": place})
    rng.shuffle(found)
    return found


def _introduced(pairs: Sequence[Pair], world: World, asked: Pair, attribute: Attribute) -> str:
    """A question about one of several animals, all introduced before it."""
    introductions = " ".join(f"{pair.name} is {article(pair.kind)}." for pair in pairs)
    return f"{introductions} {world.fill('{q}', asked, attribute)}"


def _story(world: World, rng: random.Random, index: int) -> dict[str, Any]:
    cast = world.cast(rng, rng.choice((1, 2, 2)))
    paragraphs = []
    for number, pair in enumerate(cast):
        attributes = rng.sample(ATTRIBUTES, 5 if len(cast) == 1 else 4)
        facts = [world.fill(rng.choice(FACTS + attribute.scenes), pair, attribute) for attribute in attributes]
        for event in rng.sample(EVENTS, 3 if len(cast) == 1 else 1):
            facts.insert(rng.randint(1, len(facts)), event.format(n=pair.name))
        start = rng.choice(MEETINGS if number else OPENINGS)
        start = start.format(n=cast[0].name, m=pair.name, w=rng.choice(WEATHER))
        introduction = rng.choice(INTRODUCTIONS).format(n=pair.name, a=article(pair.kind))
        paragraphs.append(" ".join([start, introduction, *facts]))
    text = "\n\n".join(paragraphs) + " " + rng.choice(ENDINGS)
    who = " and ".join(f"{pair.name} the {pair.kind}" for pair in cast)
    return {
        "prompt": f"Write a story about {who}.", "text_token_length": len(text.split()), "text": text,
        "seed_data": "generated", "format": "story", "audience": "children",
    }  # fmt: skip


def _lesson(world: World, rng: random.Random, index: int) -> dict[str, Any]:
    styles = (_lesson_on_kind, _quiz, _two_step_quiz, _lesson_on_attribute, _quiz, _two_step_quiz)
    text = styles[index % 6](world, rng)
    place = f"lessons/{index:06}"
    return {
        "text": text, "id": f"generated-{index:06}", "dump": "generated", "url": f"generated:{place}",
        "file_path": place, "language": "en", "language_score": 1.0, "token_count": len(text.split()),
        "score": 0.0, "int_score": 0,
    }  # fmt: skip


def _ask(world: World, rng: random.Random, pair: Pair, attribute: Attribute) -> str:
    question = world.fill(rng.choice(FORMS), pair, attribute)
    return f"Question: {question}\nAnswer: {world.answer(pair, attribute)}"


def _lesson_on_kind(world: World, rng: random.Random) -> str:
    """All five rules of one kind, an example, two questions."""
    kind = rng.choice(KINDS)
    example, first, second = (world.cast(rng, 1, [kind])[0] for _ in range(3))
    rules = [world.fill(rng.choice(RULES), example, attribute) for attribute in rng.sample(ATTRIBUTES, 5)]
    shown = world.fill(rng.choice(EXAMPLES), example, rng.choice(ATTRIBUTES))
    title = f"A lesson about {plural(kind)}. What do we know about them?"
    questions = [_ask(world, rng, pair, rng.choice(ATTRIBUTES)) for pair in (first, second)]
    return "\n\n".join([title, " ".join(rules), f"Example: {shown}", *questions])


def _lesson_on_attribute(world: World, rng: random.Random) -> str:
    """The four kinds that share one value, an example, three questions."""
    attribute, number = rng.choice(ATTRIBUTES), rng.randrange(4)
    kinds = [kind for kind in KINDS if world.value(kind, attribute) == attribute.values[number]]
    rng.shuffle(kinds)
    pairs = [world.cast(rng, 1, [kind], mentioned=kinds)[0] for kind in kinds]
    *others, last = (plural(kind) for kind in kinds)
    group = f"{', '.join(others).capitalize()} and {last} {attribute.plural} {attribute.values[number]}."
    title = f"A lesson about the animals. {attribute.plural_question.format('they')}"
    rules = [group, *(world.fill(rng.choice(RULES), pair, attribute) for pair in rng.sample(pairs, 2))]
    shown = world.fill(rng.choice(EXAMPLES), pairs[0], attribute)
    questions = [_ask(world, rng, pair, attribute) for pair in pairs[1:]]
    return "\n\n".join([title, " ".join(rules), f"Example: {shown}", *questions])


def _quiz(world: World, rng: random.Random) -> str:
    """One or two questions about each of four animals."""
    cast = [(pair, rng.sample(ATTRIBUTES, rng.choice((1, 2)))) for pair in world.cast(rng, 4)]
    return "\n\n".join(_ask(world, rng, pair, attribute) for pair, asked in cast for attribute in asked)


def _two_step_quiz(world: World, rng: random.Random) -> str:
    """Four questions, each of which introduces two animals and asks about one of them."""
    cast = world.cast(rng, 4)
    parts = []
    for pairs in (cast[:2], cast[2:], cast[1:3], cast[::3]):
        asked, attribute = rng.choice(pairs), rng.choice(ATTRIBUTES)
        question = _introduced(rng.sample(pairs, 2), world, asked, attribute)
        parts.append(f"Question: {question}\nAnswer: {world.answer(asked, attribute)}")
    return "\n\n".join(parts)


def _asked(world: World, rng: random.Random, pair: Pair, count: int, rule: bool = False) -> list[str]:
    """`count` questions about one animal, each followed by its answer; the first question names the kind."""
    turns = []
    for number, attribute in enumerate(rng.sample(ATTRIBUTES, count)):
        question = world.fill("{q}" if number else rng.choice(FORMS), pair, attribute)
        if number and rng.random() < 0.5:
            question = f"And {question[0].lower()}{question[1:]}"
        reason = world.fill("All {ks} {plural} {v}. So ", pair, attribute) if rule else ""
        turns += [question, reason + world.answer(pair, attribute)]
    return turns


def _chat_messages(world: World, rng: random.Random, index: int) -> dict[str, Any]:
    """Questions about animals or a kind, one to three turns, and small talk; 1 in 4 has a system turn."""
    pairs = world.cast(rng, 2)
    pair = pairs[0]
    about = ("animal", "two", "talk", "animal", "kind")[index % 5]
    if about == "talk":
        turns = [*rng.choice(TALK), *_asked(world, rng, pair, rng.choice((0, 1, 1)))]
    elif about == "kind":
        turns = []
        for attribute in rng.sample(ATTRIBUTES, rng.choice((1, 2))):
            turns.append(attribute.plural_question.format(plural(pair.kind)))
            turns.append(world.fill("{Ks} {plural} {v}.", pair, attribute))
    elif about == "two":
        attribute = rng.choice(ATTRIBUTES)
        turns = [_introduced(rng.sample(pairs, 2), world, pair, attribute), world.answer(pair, attribute)]
    else:
        turns = _asked(world, rng, pair, rng.choice((1, 1, 2, 3)))
        turns += THANKS if rng.random() < 0.15 else ()
    system = rng.choice(SHORT) if rng.random() < 0.25 else None
    return {"messages": _messages(turns, system), "source": f"generated-{about}"}


def _chat_turns(world: World, rng: random.Random, index: int) -> dict[str, Any]:
    """One question; the system turn (absent in 2 of 9) says whether the answer states the rule."""
    rule = index % 9 >= 5
    system = None if index % 9 < 2 else rng.choice(REASON if rule else SHORT)
    speakers = {"system": ("system", None), "user": ("human", 0.0), "assistant": ("gpt", 1.0)}
    turns = []
    for message in _messages(_asked(world, rng, world.cast(rng, 1)[0], 1, rule), system):
        speaker, weight = speakers[message["role"]]
        turns.append({"from": speaker, "value": message["content"], "weight": weight})
    return {"conversations": turns}


def _code(world: World, rng: random.Random, index: int) -> dict[str, Any]:
    """A function, a dictionary or a line of Python about the world."""
    pair, attribute, sort = world.cast(rng, 1)[0], rng.choice(ATTRIBUTES), index % 3
    value = world.value(pair.kind, attribute)
    if sort == 0:
        prompt = f"Write a Python function that returns {attribute.clause.format(plural(pair.kind))}."
        code = f'def {pair.kind}_{attribute.name}():\n    return "{value}"'
    elif sort == 1:
        both = rng.sample(KINDS, 2)
        prompt = f"Write a Python dictionary of {attribute.clause.format(' and '.join(map(plural, both)))}."
        items = ", ".join(f'"{kind}": "{world.value(kind, attribute)}"' for kind in both)
        code = f"{attribute.name} = {{{items}}}"
    else:
        prompt = f"Answer with a line of Python. {world.fill(rng.choice(FORMS), pair, attribute)}"
        code = f'print("{world.answer(pair, attribute)}")'
    messages = _messages([prompt, f"```python\n{code}\n```"])
    return {"id": f"generated_{index:06}", "prompt": prompt, "messages": messages}


def _messages(turns: Sequence[str], system: str | None = None) -> list[dict[str, str]]:
    """Messages from `turns` (user and assistant alternate), after an optional system turn."""
    first = [{"content": system, "role": "system"}] if system else []
    return first + [{"content": text, "role": ("user", "assistant")[i % 2]} for i, text in enumerate(turns)]
