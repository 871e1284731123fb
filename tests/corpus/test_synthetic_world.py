"""The generated world: its schemas, its one rule, and what it keeps from training."""

import re
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset, Features, Value
from datasets import List as ListOf

from vectorclm.corpus.counting import word_frequency_baseline, word_pair_baseline
from vectorclm.corpus.synthetic_world import (
    ATTRIBUTES,
    KINDS,
    QUESTIONS,
    WORLD_SETS,
    World,
    WorldConfig,
    held_out_prompts,
    rows,
    texts,
    words,
    world_documents,
)
from vectorclm.corpus.world_phrases import plural
from vectorclm.errors import ConfigError
from vectorclm.settings import digest

CONFIG = WorldConfig(documents=800, conversations=450)
TRAINING = [name for name in WORLD_SETS if name not in QUESTIONS]
MESSAGES = ListOf({"content": Value("string"), "role": Value("string")})
TURNS = ListOf({"from": Value("string"), "value": Value("string"), "weight": Value("float64")})
FEATURES: dict[str, dict[str, Any]] = {
    "stories": {
        **dict.fromkeys(("prompt", "text", "seed_data", "format", "audience"), Value("string")),
        "text_token_length": Value("int64"),
    },
    "lessons": {
        **dict.fromkeys(("text", "id", "dump", "url", "file_path", "language"), Value("string")),
        **dict.fromkeys(("language_score", "score"), Value("float64")),
        **dict.fromkeys(("token_count", "int_score"), Value("int64")),
    },
    "chat-messages": {"messages": MESSAGES, "source": Value("string")},
    "chat-turns": {"conversations": TURNS},
    "chat-code": {"id": Value("string"), "prompt": Value("string"), "messages": MESSAGES},
    **{
        name: {"context": Value("string"), "choices": ListOf(Value("string")), "answer": Value("int64")}
        for name in QUESTIONS
    },
}


@pytest.fixture(scope="module")
def world() -> World:
    return World(CONFIG)


@pytest.fixture(scope="module")
def sets() -> dict[str, list[dict[str, Any]]]:
    return {name: rows(CONFIG, name) for name in WORLD_SETS}


def tokens(text: str) -> set[str]:
    return set(re.findall(r"[A-Za-z]+", text))


def strings(value: Any) -> list[str]:
    """Every string in a row, columns that no model reads included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in strings(item)] if isinstance(value, list) else []


@pytest.mark.parametrize("name", WORLD_SETS)
def test_rows_have_the_hub_schema_and_survive_parquet(name, sets, tmp_path):
    dataset = Dataset.from_list(sets[name])
    assert dataset.features == Features(FEATURES[name])
    dataset.to_parquet(tmp_path / "rows.parquet")
    again = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
    assert again.features == dataset.features
    assert again.to_list() == sets[name]


def test_the_same_config_gives_the_same_rows_and_another_seed_others(sets):
    first = {name: digest(sets[name]) for name in WORLD_SETS}
    assert {name: digest(rows(CONFIG, name)) for name in WORLD_SETS} == first
    other = WorldConfig(**{**CONFIG.model_dump(), "seed": 1})
    assert all(digest(rows(other, name)) != first[name] for name in WORLD_SETS)
    # the bytes are a promise to whoever has a fingerprint of them: a new value here is a new world
    assert digest(first) == "8dcf00be735c75d2f863e0cfd2cd3ffb3c84793338cf7dc2d75e2bfb57871183"


def test_an_unknown_set_is_named_with_its_neighbours():
    with pytest.raises(ConfigError, match=r"'poems'.*stories"):
        rows(CONFIG, "poems")


def test_attributes_are_independent_of_each_other(world):
    for first in range(5):
        for second in range(first):
            pairs = {(values[first], values[second]) for values in world.table.values()}
            assert len(pairs) == 16


def test_conversations_take_turns(sets):
    for row in sets["chat-messages"] + sets["chat-code"]:
        roles = [message["role"] for message in row["messages"]]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert spoken == ["user", "assistant"] * (len(spoken) // 2) and spoken
    chats = [[message["role"] for message in row["messages"]] for row in sets["chat-messages"]]
    assert sum(roles.count("user") > 1 for roles in chats) > len(chats) / 5
    assert sum(roles[0] == "system" for roles in chats) > len(chats) / 10
    weights = {(t["from"], t["weight"]) for row in sets["chat-turns"] for t in row["conversations"]}
    assert weights == {("system", None), ("human", 0.0), ("gpt", 1.0)}
    speakers = Counter(tuple(turn["from"] for turn in row["conversations"]) for row in sets["chat-turns"])
    assert speakers == {("human", "gpt"): 100, ("system", "human", "gpt"): 350}


def test_documents_are_short_and_the_vocabulary_is_the_stated_one(sets):
    for name in ("stories", "lessons"):
        lengths = [len(row["text"].split()) for row in sets[name]]
        assert min(lengths) >= 45 and max(lengths) <= 150 and 80 <= sum(lengths) / len(lengths) <= 110
        assert len({row["text"] for row in sets[name]}) == len(lengths)
    vocabulary = words(WorldConfig())
    assert len(vocabulary) == 251
    used = {word.lower() for name in WORLD_SETS for row in sets[name] for t in texts(row) for word in tokens(t)}
    assert used <= set(vocabulary)


@pytest.mark.parametrize("name", TRAINING)
def test_no_training_row_has_a_held_out_pair_or_answer(name, sets, world):
    held_out = {(name_, form) for name_, kind in world.held_out() for form in (kind, plural(kind))}
    held_out |= {(name_, form.capitalize()) for name_, form in held_out}
    answers = {row["choices"][row["answer"]].strip() for row in sets["questions"]}
    assert len(answers) == len(world.held_out()) == 4 * CONFIG.names
    for row in sets[name]:
        text = "\n".join(strings(row))
        found = tokens(text)
        assert not {(n, k) for n in found & set(world.names) for k in found if (n, k) in held_out}
        assert not any(answer in text for answer in answers)


@pytest.mark.parametrize("name", TRAINING)
def test_a_name_never_meets_its_held_out_value(name, sets, world):
    """Stronger than the pair: no sentence, in any words, says of Pim what is held out for Pim."""
    values = {n: ATTRIBUTES[attribute].values[value].split()[-1] for n, (attribute, value) in world.held.items()}
    for row in sets[name]:
        for text in strings(row):
            for sentence in re.split(r"[.!?\n]", text):
                found = tokens(sentence)
                assert not any(values[n] in found for n in found & set(world.names)), sentence


def test_every_statement_follows_from_the_table(sets, world):
    """Wherever one animal or kinds are spoken of in a sentence with a value, the table says the same."""
    kinds = {form: kind for kind in KINDS for form in (kind, plural(kind), plural(kind).capitalize())}
    values = {v.split()[-1]: (a, v) for a in ATTRIBUTES for v in a.values}
    stated: Counter[str] = Counter()
    for name in TRAINING:
        for row in sets[name]:
            given: dict[str, str] = {}
            for sentence in re.split(r"[.!?]", "\n".join(texts(row)).replace(":", ".")):
                for who, kind in re.findall(r"\b([A-Z][a-z]+) (?:is an?|the) (\w+)", sentence):
                    given |= {who: kind} if kind in KINDS else {}
                for kind, who in re.findall(r"\ban? (\w+) called ([A-Z][a-z]+)", sentence):
                    given[who] = kind
                found = re.findall(r"[A-Za-z]+", sentence.replace("_", " "))
                said = [values[word] for word in found if word in values and name != "chat-code"]
                about = {kinds[word] for word in found if word in kinds}
                about |= {given[word] for word in found if word in world.names and said}
                for attribute, value in said:
                    assert about and {world.value(kind, attribute) for kind in about} == {value}, sentence
                    stated[name] += 1
    assert all(stated[name] >= 400 for name in TRAINING if name != "chat-code")


def test_code_runs_and_says_what_the_table_says(sets, world, capsys):
    seen: Counter[str] = Counter()
    for row in sets["chat-code"]:
        prompt, answer = (message["content"] for message in row["messages"])
        assert prompt == row["prompt"]
        scope: dict[str, Any] = {}
        exec(re.fullmatch(r"```python\n(.*)\n```", answer, re.DOTALL)[1], scope)
        scope.pop("__builtins__")
        printed = capsys.readouterr().out
        if not scope:
            who, kind = re.match(r"(\w+) the (\w+)", printed).groups()
            assert (who, kind) not in world.held_out()
            assert any(f"{world.value(kind, a)}.\n" in printed and a.verb in printed for a in ATTRIBUTES)
            seen["line"] += 1
        for name, value in scope.items():
            kind, _, called = name.rpartition("_")
            attribute = next(a for a in ATTRIBUTES if a.name == called)
            found = {kind: value()} if kind else value
            assert found == {k: world.value(k, attribute) for k in found}
            seen["function" if kind else "dictionary"] += 1
    assert seen == {"line": 150, "function": 150, "dictionary": 150}


@pytest.mark.parametrize("seed", [0, 1])
def test_questions_are_balanced_right_and_beyond_word_frequency(seed, sets):
    config = WorldConfig(seed=seed, documents=300, conversations=1)
    world, questions = World(config), rows(config, "questions")
    assert len(questions) == 480
    gold: Counter[str] = Counter()
    for row in questions:
        assert len(set(row["choices"])) == 4 and all(choice.startswith(" ") for choice in row["choices"])
        assert row["context"].startswith("Question: ") and row["context"].endswith("\nAnswer:")
        who, kind = re.match(r" (\w+) the (\w+)", row["choices"][0]).groups()
        assert (who, kind) in world.held_out() and {who, kind} <= tokens(row["context"])
        right = row["choices"][row["answer"]]
        attribute = next(a for a in ATTRIBUTES if f" {a.verb} " in right)
        assert right == f" {who} the {kind} {attribute.verb} {world.value(kind, attribute)}."
        gold[world.value(kind, attribute)] += 1
    assert set(gold.values()) == {24} and len(gold) == 20
    assert Counter(row["answer"] for row in questions) == dict.fromkeys(range(4), 120)
    assert abs(word_frequency_baseline(questions, world_documents(config)) - 0.25) <= 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_counting_pairs_of_words_answers_one_step_and_not_two(seed):
    """The second step alone, from a kind to its value, leaves two of the four choices."""
    config = WorldConfig(seed=seed, documents=1000, conversations=1)
    documents = world_documents(config)
    assert word_pair_baseline(rows(config, "questions"), documents) >= 0.9
    assert abs(word_pair_baseline(rows(config, "two-step-questions"), documents) - 0.5) <= 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_two_step_questions_have_one_right_answer_that_each_part_leaves_open(seed):
    config = WorldConfig(seed=seed, documents=1, conversations=1)
    world, questions = World(config), rows(config, "two-step-questions")
    assert len(questions) == 480 == len({row["context"] for row in questions})
    firsts: Counter[bool] = Counter()
    for row in questions:
        introduced = dict(re.findall(r"(\w+) is an? (\w+)\.", row["context"]))
        assert len(introduced) == 2 and len(set(row["choices"])) == 4
        said = [re.fullmatch(r" (\w+) the (\w+) (.+)\.", choice).groups() for choice in row["choices"]]
        (name,) = {who for who, _, _ in said}
        attribute = next(a for a in ATTRIBUTES if a.question.format(name) in row["context"])
        true = {kind: f"{attribute.verb} {world.value(kind, attribute)}" for kind in introduced.values()}
        assert {(kind, fact) for _, kind, fact in said} == {(k, f) for k in true for f in true.values()}
        assert said[row["answer"]] == (name, introduced[name], true[introduced[name]])
        assert {(name, kind) for kind in true} <= set(world.held_out())
        assert attribute != ATTRIBUTES[world.held[name][0]]  # whose value never stands beside the name
        firsts[next(iter(introduced)) == name] += 1
    assert firsts == {True: 240, False: 240}
    assert Counter(row["answer"] for row in questions) == dict.fromkeys(range(4), 120)


def test_the_word_pair_baseline_counts_sentences_and_shares_ties():
    question = {"context": "An owl?", "choices": [" red", " blue"], "answer": 1}
    assert word_pair_baseline([question], ["An owl is blue. A bear is red."]) == 1.0
    assert word_pair_baseline([question], ["An owl is here. It is blue. Red owl!"]) == 0.0
    assert (
        word_pair_baseline([question], ["An owl is red\nAn owl is blue"]) == 0.5 == word_pair_baseline([question], [])
    )


def test_the_word_frequency_baseline_counts_words_and_shares_ties():
    question = {"context": "?", "choices": [" a b", " a c", " a d", " a e"], "answer": 1}
    assert word_frequency_baseline([question], ["a c c b"]) == 1.0
    assert word_frequency_baseline([question], ["a b b c"]) == 0.0
    assert word_frequency_baseline([question], ["a b c"]) == 0.5
    assert word_frequency_baseline([question], []) == 0.25


def test_held_out_prompts_are_chat_questions_with_one_right_answer(sets, world):
    prompts = held_out_prompts(CONFIG)
    assert len({item["prompt"] for item in prompts}) == 480 == len(prompts)
    asked = {row["context"]: row["choices"][row["answer"]] for row in sets["questions"]}
    assert all(asked[f"Question: {p['prompt']}\nAnswer:"] == f" {p['answer']}" for p in prompts)
    trained = {text for name in TRAINING for row in sets[name] for text in texts(row)}
    assert not any(item["prompt"] in trained for item in prompts)
