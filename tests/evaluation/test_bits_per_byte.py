"""transformers' own Llama is the reference of every score."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import write_random_model
from tests.test_model import CONFIG
from vectorclm.corpus.sources import TaskSource
from vectorclm.errors import DataError
from vectorclm.evaluation.bits_per_byte import text_scores
from vectorclm.evaluation.multiple_choice import Item, pair_ids, read_items, task_scores
from vectorclm.inference.config import SamplingParams
from vectorclm.inference.generate import answer, continuation, generate
from vectorclm.model import CausalLM
from vectorclm.shards.chat_writer import read_prompts
from vectorclm.shards.conversations import Turn
from vectorclm.store.artifact import StageSpec, Store, build
from vectorclm.tokenizer import BOS_ID, encode, load_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights."""
    return write_random_model(tmp_path_factory.mktemp("model"), tiny_text, CONFIG, 20_000, chat=False)


def reference(folder: Path, ids: list[int], scored: int) -> float:
    """Nats of the last `scored` of `ids`, by transformers."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids[:-1]])).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    return float(losses[-scored:].sum())


@pytest.mark.parametrize("tokens", [1, 5, 63, 64, 65, 128, 150])
def test_a_text_scores_what_transformers_says(folder: Path, tokens: int) -> None:
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    text = tokenizer.decode(encode(tokenizer, "The fox swims, 12 boats; ça va? " * 40)[:tokens])
    ids = encode(tokenizer, text)
    expected, done = 0.0, 0
    while done < len(ids):  # windows of 64 inputs that do not overlap, the last one moved back to be full
        end = min(done + 64, len(ids))
        expected += reference(folder, [BOS_ID, *ids][max(0, end - 64) : end + 1], end - done)
        done = end
    scores = text_scores(model, tokenizer, text, CPU)
    assert scores["tokens"] == len(ids) and scores["bytes"] == len(text.encode())
    assert scores["nats_per_token"] == pytest.approx(expected / len(ids), rel=1e-5)
    assert scores["bits_per_byte"] == pytest.approx(expected / math.log(2) / len(text.encode()), rel=1e-5)


def test_choices_score_what_transformers_says_in_any_batch(folder: Path) -> None:
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    contexts = ["The fox", "Wer singt im Wald? " * 9, "12", "", "the lake at night, and makes"]
    choices = (" swims by the lake.", " sings", " in the wood and at night", " 12 boats")
    items = [Item(context, choices, answer) for context, answer in zip(contexts, (0, 1, 2, 3, 0), strict=True)]
    right = right_norm = 0
    for item in items:
        values = [-reference(folder, *pair_ids(tokenizer, item.context, item.choices[c], 64)) for c in range(4)]
        right += values.index(max(values)) == item.answer
        normed = [value / len(choice) for value, choice in zip(values, choices, strict=True)]
        right_norm += normed.index(max(normed)) == item.answer
    for micro_batch in (1, 3, 20):
        scores = task_scores(model, tokenizer, "x", items, micro_batch)
        assert (scores["acc"], scores["acc_norm"]) == (right / 5, right_norm / 5)
    assert scores["chance"] == 0.25 and scores["items"] == 5


def test_a_row_that_is_no_question_is_named() -> None:
    task = TaskSource(label="quiz", path="json")
    with pytest.raises(DataError, match=r"quiz, row 0: not a multiple-choice question: .*answer 1 of 1 choices"):
        read_items(task, [{"context": "q?", "choices": ["x"], "answer": 1}], 0)
    with pytest.raises(DataError, match="quiz: no questions"):
        read_items(task, [], 0)


def test_greedy_continuation_is_that_of_transformers(folder: Path) -> None:
    ours, theirs = CausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = [BOS_ID, *encode(load_tokenizer(folder), "The otter")]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False)[0, len(prompt) :].tolist()
    assert list(generate(ours, prompt, 30)) == expected


def test_generation_ends_where_the_context_is_full_and_repeats_with_its_seed(folder: Path) -> None:
    model = CausalLM.from_pretrained(folder)
    assert len(list(generate(model, [5] * 60, 30, stop_ids=()))) == 4
    drawn = [
        list(generate(model, [5], 30, sampling=SamplingParams(temperature=1.0, top_p=0.9, seed=seed)))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_command_prints_one_object_and_refuses_what_is_no_text(folder: Path, tmp_path: Path) -> None:
    def evaluate(file: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "vectorclm", "evaluate", str(folder), "--text", str(file), "--json"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    (tmp_path / "text").write_text("The fox swims.")
    scores = json.loads(evaluate(tmp_path / "text").stdout.splitlines()[-1])
    expected = text_scores(CausalLM.from_pretrained(folder), load_tokenizer(folder), "The fox swims.", CPU)
    assert scores["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-5)
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    refused = evaluate(tmp_path / "bytes")
    assert refused.returncode == 2 and "is not UTF-8: byte 3" in refused.stderr


def test_a_tokenizer_saved_with_truncation_still_reads_the_whole_text(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "The otter swims by the lake at night, and makes boats. " * 3
    assert encode(load_tokenizer(tmp_path), text) == encode(load_tokenizer(folder), text)


def test_a_choice_whose_tokens_merge_with_the_context_is_scored(folder: Path) -> None:
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    word = next(
        w for w in ("swims", "otter", "night", "lake") if len(encode(tokenizer, w)) < len(encode(tokenizer, w[:-1])) + 1
    )
    item = Item(word[:-1], (word[-1], " otter"), 0)
    ids, scored = pair_ids(tokenizer, item.context, item.choices[0], 64)
    assert ids == [BOS_ID, *encode(tokenizer, word)]
    assert scored >= 1
    assert reference(folder, ids, scored) > 0
    scores = task_scores(model, tokenizer, "x", [item, item._replace(answer=1)], 4)
    assert scores["acc"] == 0.5  # one of the two answers is the likelier, whichever


def test_a_broken_model_gets_no_score(folder: Path) -> None:
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="no finite likelihood"):
        task_scores(model, tokenizer, "blimp", [Item("", ("The otter.", "Otter the."), 0)], 4)


@pytest.mark.parametrize("choices", [["a", ""], ["a", "\ud800"]])
def test_a_choice_that_is_no_text_is_refused(choices: list[str]) -> None:
    task = TaskSource(label="x", path="world")
    with pytest.raises(DataError, match="x, row 0"):
        read_items(task, [{"context": "q", "choices": choices, "answer": 0}], 1)


def test_prompts_are_drawn_over_all_sources(tmp_path: Path) -> None:
    rows = [
        {"source": label, "messages": [{"role": "user", "content": f"{label} {n}"}], "answer": "x"}
        for label in "abc"
        for n in range(50)
    ]

    def produce(out: Path) -> dict[str, Any]:
        (out / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {}

    artifact, _ = build(Store(str(tmp_path)), StageSpec("chat_shards", 1, {}, {}), produce)
    drawn = read_prompts(artifact, 60, 1)
    assert drawn == read_prompts(artifact, 60, 1)
    assert {turns[0].content[0] for turns, _ in drawn} == set("abc")
    assert len({turns[0].content for turns, _ in drawn}) == 60


def test_a_long_conversation_forgets_its_oldest_turns_and_is_answered(folder: Path) -> None:
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    turns = [Turn("user", "The lake. "), Turn("assistant", "No."), Turn("user", "Why?")]
    for conversation in (turns * 6, [Turn("user", "The otter swims. " * 60)]):
        ids = list(answer(model, tokenizer, conversation, 64))
        assert ids and len(ids) <= 32
    assert continuation(model, tokenizer, "otter " * 90, 10)
    varied = SamplingParams(repetition_penalty=100.0)
    said = list(answer(model, tokenizer, [Turn("user", "Otter?")], 40, varied))
    assert len(said) == len(set(said)) > 20  # no token twice
    assert continuation(model, tokenizer, "otter", 40, varied) != continuation(model, tokenizer, "otter", 40)
    assert list(answer(model, tokenizer, turns[:1], 4, sampling=SamplingParams(temperature=1.0, top_p=1e-9)))
