"""Prompts that can be followed, checks that hold for what follows them and for nothing else, and scores of models."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.conftest import ANSWERS, write_random_model
from tests.test_model import CONFIG
from vectorclm.errors import ConfigError
from vectorclm.evaluation.config import EvaluateConfig
from vectorclm.evaluation.instruction_checks import CONTENT, PARTS, Check, Instruction, holds
from vectorclm.evaluation.instruction_prompts import FORMS, MOST, SHOTS, instructions
from vectorclm.evaluation.instructions import STOP, base_answer, chat_answer, few_shot, instruction_scores, judge
from vectorclm.evaluation.item_scores import ItemScore, ItemScores, read_scored
from vectorclm.inference.config import SamplingParams
from vectorclm.model import CausalLM
from vectorclm.settings import validate
from vectorclm.tokenizer import EOS_ID, encode, load_tokenizer

# What is as asked, and what is not by little.
EXAMPLES = [
    (Check("word", "salt"), ["Salt!", "The sea (salt)."], ["salty", "basalt", "", "sal t"]),
    (Check("avoid", "water"), ["The waters."], ["Cold water.", "WATER", " "]),
    (Check("twice", "drum"), ["A drum, a Drum."], ["drum", "drum drums"]),
    (Check("function", "is_even"), ["```python\ndef is_even(n):\n```"], ["is_even(2)", "def is_even_number(n):"]),
    (Check("repeat", "A cat sat."), ["He said: a cat\n sat. Yes."], ["A cat sat", "A cat, sat."]),
    (Check("most_words", 3), ["it's well-known, yes"], ["one two three four", ""]),
    (Check("least_words", 3), ["one two three"], ["one two - !"]),
    (Check("sentences", 2), ["Is it? It is.", 'He said "No." So what!'], ["One.", "One. Two. Three.", "One. Two. And"]),
    (Check("bullets", 2), ["Well:\n- a\n- b"], ["- a\n-b", "- a\n- b\n- c", "* a\n* b"]),
    (
        Check("json", ("name", "place")),
        ['{"name": "a", "place": [1]}', '```json\n{"place": 1, "name": 2, "x": 3}\n```'],
        ['{"name": "a"}', '{"name": "a", "place": 1} Yes', '["name", "place"]', "{name: 1, place: 2}", "[" * 99_999],
    ),
    (Check("capitals"), ["ALL OF IT, 12!"], ["ALL oF IT", "12"]),
    (Check("small_letters"), ["all of it, 12"], ["All of it"]),
    (
        Check("first_words", "To begin with,"),
        ["To begin with, a cat."],
        ["So: To begin with, a cat.", "to begin with,"],
    ),
    (Check("last_words", "And so it ends."), ["A cat. And so it ends.\n"], ["And so it ends. Or not."]),
    (Check("no_commas"), ["one two"], ["one, two"]),
    (Check("title"), ["<<The sea>>\nIt is wide."], ["<The sea>", "<<>>", "<<The\nsea>>"]),
    (Check("paragraphs", 2), ["a\nb\n\nc", "a\n \n\nb"], ["a\nb", "a\n\nb\n\nc"]),
]


@pytest.mark.parametrize(("check", "right", "wrong"), EXAMPLES, ids=lambda value: getattr(value, "kind", ""))
def test_a_check_holds_for_what_is_as_asked_alone(check: Check, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not holds(check, text)] == []
    assert [text for text in wrong if holds(check, text)] == []


def test_every_kind_of_check_is_tried_and_asked_for() -> None:
    kinds = {check.kind for check, *_ in EXAMPLES}
    assert kinds == CONTENT | set(FORMS)
    assert kinds == {check.kind for asked in instructions(MOST) for check in asked.checks}


def obedient(asked: Instruction) -> str:
    """An answer made from what is checked."""
    told = {kind: [check.what for check in asked.checks if check.kind == kind] for kind in CONTENT | set(FORMS)}
    words = [str(word) for word in told["word"] + 2 * told["twice"]]
    text = f"it is of {' and '.join(words) or 'that'}"
    if told["function"]:
        return f"def {told['function'][0]}():\n    return 1"
    if told["repeat"]:
        return str(told["repeat"][0])
    if told["json"]:
        return json.dumps(dict.fromkeys(told["json"][0], text))  # type: ignore[call-overload]
    if told["bullets"]:
        return "\n".join([f"- {text}"] * int(str(told["bullets"][0])))
    if told["paragraphs"]:
        return "\n\n".join([text] * int(str(told["paragraphs"][0])))
    if told["sentences"]:
        return " ".join([f"{text}."] * int(str(told["sentences"][0])))
    if told["least_words"]:
        return f"{text} {'more ' * int(str(told['least_words'][0]))}"
    begin = told["first_words"] or (["<<title>>\n"] if told["title"] else [""])
    text = f"{begin[0]} {text}{''.join(f'. {end}' for end in map(str, told['last_words']))}"
    return text.upper() if told["capitals"] else text.lower() if told["small_letters"] else text


def test_the_prompts_are_fixed_all_different_and_each_can_be_followed() -> None:
    asked = instructions(MOST)
    assert len(asked) == len({instruction.prompt for instruction in asked}) == MOST == 200
    assert instructions(24) == asked[:24] and instructions(MOST) == asked
    assert asked[0].prompt == 'Write a short text about a small farm. Use the word "tractor".'
    for instruction in asked:
        assert [check for check in instruction.checks if not holds(check, obedient(instruction))] == [], instruction
        assert any(check.is_content for check in instruction.checks)
        named = [str(check.what) for check in instruction.checks if check.is_content]
        assert all(word in instruction.prompt for word in named)  # a model can know what it is judged by
    assert sum(any(not check.is_content for check in instruction.checks) for instruction in asked) == 108
    for instruction, answer in SHOTS:
        assert all(holds(check, answer) for check in instruction.checks) and STOP not in answer
    with pytest.raises(ConfigError, match=r"instructions: Input should be less than or equal to 200 \(got 201\)"):
        validate(EvaluateConfig, {"prompts": ["a"], "instructions": MOST + 1}, "x")


def test_content_and_form_are_counted_apart(tmp_path: Path) -> None:
    word, short = Check("word", "salt"), Check("most_words", 3)
    asked = [Instruction("a", (word, short)), Instruction("b", (word, short)), Instruction("c", (word,))]
    found = ItemScores()
    scores = judge(asked, ["much salt", "no", "so much of the salt"], found)
    assert {name: (scores[name]["share"], scores[name]["items"]) for name in PARTS} == {
        "followed_content": (2 / 3, 3),
        "followed_form": (1.0, 2),
        "followed": (2 / 3, 3),
    }
    assert scores["followed"]["stderr"] == pytest.approx((2 / 9 / 2) ** 0.5)
    assert scores["checks"] == {"word": {"held": 2, "of": 3}, "most_words": {"held": 2, "of": 2}}
    found.add_question("quiz", 0, ItemScore(b"q", True, False, [-1.0, -2.0], ["q"]))
    found.write(tmp_path)
    read = read_scored(tmp_path)
    assert list(read) == ["followed_content", "followed_form", "followed", "acc.quiz", "acc_norm.quiz"]
    assert read["followed_content"].parts.tolist() == [1, 0, 1] and read["followed_form"].parts.tolist() == [1, 1]
    assert read["followed"].ids[:2] == read["followed_form"].ids != read["followed"].ids[1:]


@pytest.fixture(scope="module")
def base_folder(tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with random weights."""
    return write_random_model(tmp_path_factory.mktemp("base"), tiny_text, CONFIG, 20_000, chat=False)


def test_a_chat_model_answers_in_its_template_and_a_base_model_after_examples(
    base_folder: Path, chat_folder: Path, tmp_path: Path
) -> None:
    asked = instructions(8)
    for folder, chat in ((base_folder, False), (chat_folder, True)):
        model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
        respond = partial(chat_answer if chat else base_answer, tokenizer=tokenizer)
        out = tmp_path / str(chat)
        out.mkdir()
        scores = instruction_scores(model, partial(respond, max_new_tokens=12), asked, out, ItemScores())
        lines = [json.loads(line) for line in (out / "instructions.jsonl").read_text().splitlines()]
        assert [line["prompt"] for line in lines] == [instruction.prompt for instruction in asked]
        for line, (prompt, checks) in zip(lines, asked, strict=True):
            assert line["answer"] == respond(model, prompt=prompt, max_new_tokens=12)[0]
            assert [one["holds"] for one in line["checks"]] == [holds(check, line["answer"]) for check in checks]
        sampling = SamplingParams(repetition_penalty=50.0)
        instruction_scores(model, partial(respond, max_new_tokens=12, sampling=sampling), asked[:1], out, ItemScores())
        (line,) = map(json.loads, (out / "instructions.jsonl").read_text().splitlines())
        once = respond(model, prompt=asked[0].prompt, max_new_tokens=12, sampling=sampling)[0]
        assert line["answer"] == once != lines[0]["answer"]
        held = Counter(one["kind"] for line in lines for one in line["checks"] if one["holds"])
        assert {kind: count["held"] for kind, count in scores["checks"].items() if count["held"]} == held


def test_a_base_model_reads_as_many_examples_as_fit_and_stops_before_another_one(
    base_folder: Path, chat_folder: Path
) -> None:
    tokenizer = load_tokenizer(base_folder)
    prompt = 'Say "salt".'
    text = [tokenizer.decode(few_shot(tokenizer, prompt, room)[1:]) for room in (4000, 400, 60)]
    shots = [said.count("\nAnswer: ") for said in text]
    assert shots[0] == len(SHOTS) > shots[1] > shots[2] == 0
    assert all(said.endswith(f"Instruction: {prompt}\nAnswer:") for said in text)
    assert len(few_shot(tokenizer, prompt, 10)) == 10

    class Fluent(CausalLM):
        """Says what it is told to, whatever it reads."""

        def next_logits(self, *_: object) -> torch.Tensor:
            logits = torch.zeros(1, CONFIG.vocab_size)
            logits[0, said.pop(0)] = 1.0
            return logits

    said = encode(tokenizer, "It is\n\nsalt.\n\nInstruction: Say") + [5] * 99
    assert base_answer(Fluent(CONFIG), tokenizer, prompt, 32) == ("It is\n\nsalt.", True)
    assert len(said) > 99  # nothing more was made
    said = [*encode(tokenizer, "It"), EOS_ID, 9]
    assert base_answer(Fluent(CONFIG), tokenizer, prompt, 32) == ("It", True) and said == [9]
    said = encode(tokenizer, "It is") + [9] * 99
    assert base_answer(Fluent(CONFIG), tokenizer, prompt, 3)[1] is False
    model = CausalLM.from_pretrained(chat_folder)
    for question, known in ANSWERS.items():
        assert chat_answer(model, load_tokenizer(chat_folder), question, 32) == (known, True)
        assert chat_answer(model, load_tokenizer(chat_folder), question, 2)[1] is False
