"""`tiny` as a newcomer runs it: one command, and the model answers questions whose answers it never read."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.reports.summary import Summary
from tests.conftest import llama_cpp
from tests.test_pages import PAGES, README, fenced
from vectorclm.bench.gguf import greedy_differences
from vectorclm.config import load_experiment
from vectorclm.corpus.counting import word_frequency_baseline
from vectorclm.corpus.synthetic_world import held_out_prompts, rows, texts
from vectorclm.evaluation.multiple_choice import read_items, task_scores
from vectorclm.export.gguf import export_gguf
from vectorclm.inference.generate import answer, answer_text, generate
from vectorclm.model import CausalLM
from vectorclm.shards.conversations import Turn, render_prompt
from vectorclm.store.artifact import Store
from vectorclm.store.model_ref import find_model
from vectorclm.tokenizer import BOS_ID, encode, load_tokenizer

EXPERIMENT, _ = load_experiment("tiny")
assert EXPERIMENT.world is not None
QUESTIONS = rows(EXPERIMENT.world, "questions")
ASKED = "What does Xena the mole eat?"  # on the page
PROMPT = "Question: Pim is an otter. Where does Pim live?\nAnswer:"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `vectorclm run tiny --json` prints last; on one core, as other tests have the others."""
    store = tmp_path_factory.mktemp("tiny") / "store"
    command = [sys.executable, "-m", "flows.cli", "run", "tiny", "--json", "--threads", "1", "--store", str(store)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_TRACKING"))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return summary


def test_the_base_model_answers_held_out_questions(result: dict[str, Any]) -> None:
    assert {stage["state"] for stage in result["stages"].values()} == {"built"}
    tasks = result["scores"]["base"]["tasks"]
    assert tasks["world"]["acc"] >= 0.9
    assert tasks["world"]["items"] == len(QUESTIONS) == tasks["world-two-step"]["items"]


def test_scores_stand_beside_counting(result: dict[str, Any]) -> None:
    """Counting which words share a sentence answers questions of one step, and half of those of two: the second step.

    A million tokens teach the second step, and not to find a name's kind among two; a model that does has more.
    """
    tasks = result["scores"]["base"]["tasks"]
    assert tasks["world"]["counting"] >= 0.9 and abs(tasks["world-two-step"]["counting"] - 0.5) <= 0.05
    assert tasks["world-two-step"]["acc"] >= tasks["world-two-step"]["chance"] + 0.15


def test_an_untrained_model_and_word_frequencies_guess(result: dict[str, Any]) -> None:
    assert EXPERIMENT.world is not None
    tokenizer = load_tokenizer(Path(result["models"]["base"]))
    torch.manual_seed(0)
    items = read_items(EXPERIMENT.evaluate.tasks[0], QUESTIONS, EXPERIMENT.seed)
    untrained = task_scores(CausalLM(EXPERIMENT.model), tokenizer, "world", items, 32)
    assert abs(untrained["acc"] - 0.25) <= 0.05
    read = [text for name in ("stories", "lessons") for row in rows(EXPERIMENT.world, name) for text in texts(row)]
    assert abs(word_frequency_baseline(QUESTIONS, read) - 0.25) <= 0.05


def test_the_chat_model_stays_in_its_template(result: dict[str, Any]) -> None:
    chat = result["scores"]["chat"]["chat"]
    assert chat["prompts"] == 100
    assert chat["answered_in_template"] >= 95 and chat["ended"] >= 95


def test_the_chat_model_answers_questions_about_pairs_it_never_read(result: dict[str, Any]) -> None:
    assert EXPERIMENT.world is not None
    folder = Path(result["models"]["chat"])
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    prompts = held_out_prompts(EXPERIMENT.world)[::8]
    right = sum(answer_text(model, tokenizer, item["prompt"], 40) == item["answer"] for item in prompts)
    assert right >= 0.75 * len(prompts), f"{right} of {len(prompts)}"


def test_transformers_opens_both_models_and_says_the_same(result: dict[str, Any]) -> None:
    for kind in ("base", "chat"):
        folder = Path(result["models"][kind])
        ours, theirs = CausalLM.from_pretrained(folder).eval(), AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer, judge = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
        ids = [BOS_ID, *encode(tokenizer, PROMPT)]
        assert judge(PROMPT)["input_ids"] == ids
        with torch.no_grad():
            assert (ours(torch.tensor([ids])) - theirs(torch.tensor([ids])).logits).abs().max() < 1e-4
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=40, do_sample=False)[0, len(ids) :].tolist()
        stops = theirs.generation_config.eos_token_id
        mine = list(generate(ours, ids, 40, stop_ids=stops if isinstance(stops, list) else [stops]))
        assert mine == expected


def test_the_chat_template_gives_transformers_the_same_prompt_and_answer(result: dict[str, Any]) -> None:
    folder = Path(result["models"]["chat"])
    ours, theirs = CausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer, judge = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    question = "Where does Pim the otter live?"
    messages = [{"role": "user", "content": question}]
    encoded = judge.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert encoded["input_ids"][0].tolist() == render_prompt(tokenizer, [Turn("user", question)])
    made = theirs.generate(**encoded, max_new_tokens=40, do_sample=False)[0, encoded["input_ids"].shape[1] :].tolist()
    assert made == list(answer(ours, tokenizer, [Turn("user", question)], 40))


def test_llama_cpp_gives_the_same_answers(result: dict[str, Any], tmp_path: Path) -> None:
    assert EXPERIMENT.world is not None
    folder = Path(result["models"]["chat"])
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    items = held_out_prompts(EXPERIMENT.world)[::40]
    prompts = [render_prompt(tokenizer, [Turn("user", item["prompt"])]) for item in items]
    exact = llama_cpp(export_gguf(find_model(str(folder)), "f32", tmp_path / "f32.gguf"))
    assert all(tie.near for tie in greedy_differences(model, exact, prompts, 40))
    rounded = llama_cpp(export_gguf(find_model(str(folder)), "q8_0", tmp_path / "q8_0.gguf"))
    answers = [tokenizer.decode(rounded.greedy(prompt, 40), skip_special_tokens=True) for prompt in prompts]
    right = sum(found == item["answer"] for found, item in zip(answers, items, strict=True))
    assert right >= 0.75 * len(items), f"{right} of {len(items)}"


def test_the_screen_is_that_of_the_page(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the time, and what another CPU rounds otherwise; the first command below it opens a chat."""
    store = Store(str(Path(result["stages"]["export"]["uri"]).parents[1]))
    monkeypatch.setenv("VECTORCLM_STORE", store.uri)
    handles = {name: {**handle, "stage": name} for name, handle in result["stages"].items()}
    screens = {}
    for details in (False, True):
        console = Console(record=True, file=io.StringIO(), width=80)
        Summary(EXPERIMENT, store, handles).show(console, details=details)
        screens[details] = console.export_text()
    (page,) = (block for block in fenced(README) if "tiny: a chat model" in block)
    varying = r"\d+\.\d%|\d+ of 100|built in .*|\S*vectorclm "
    shown, expected = (re.sub(varying, "…", text) for text in (screens[False], page))
    lines = [[" ".join(line.split()) for line in text.splitlines()] for text in (shown, expected)]
    answers = [line for line in lines[0] if line.startswith("model ")]
    kept = [[line for line in text if line and not line.startswith("model ")] for text in lines]
    assert kept[0] == kept[1] and len(answers) == 3
    assert all(f"you {prompt}" in kept[0] for prompt in EXPERIMENT.evaluate.prompts)
    assert {"finetune", "lessons", "artifacts"} <= set(screens[True].split())
    assert "mlflow ui --backend-store-uri" in screens[True]
    line = screens[False].partition("next\n")[2].splitlines()[0]
    talk = subprocess.run(shlex.split(line), input=f"{ASKED}\n", capture_output=True, text=True, check=False)
    assert talk.returncode == 0 and "model> " in talk.stdout, talk.stderr


def test_the_snippet_for_transformers_answers(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """As it stands on the page."""
    (snippet,) = (block for block in fenced(PAGES["vectorclm/export/README.md"], "python") if "AutoModel" in block)
    folder = Path(result["models"]["chat"])
    exec(snippet, {"folder": str(folder)})
    said = answer_text(CausalLM.from_pretrained(folder), load_tokenizer(folder), ASKED, 40)
    assert ASKED in snippet and said and said in capsys.readouterr().out


def test_the_snippet_for_openai_asks_the_command_above_it(result: dict[str, Any]) -> None:
    """As both stand on the page, but for the port and the store."""
    page = PAGES["vectorclm/inference/README.md"]
    (command,) = (block for block in fenced(page) if "vectorclm serve tiny" in block and "API_KEY" in block)
    (snippet,) = (block for block in fenced(page, "python") if "openai.OpenAI" in block)
    key = "a-key-of-this-test-0123"
    store = next(str(parent) for parent in Path(result["models"]["chat"]).parents if parent.name == "store")
    words = [sys.executable, "-m", "flows.cli", *command.partition(" vectorclm ")[2].partition("#")[0].split()]
    environment = {**os.environ, command.partition("=")[0]: key, "VECTORCLM_STORE": store}
    with subprocess.Popen([*words, "--port", "0"], env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = re.findall(r"http://\S+/v1", server.stdout.readline())[0]
            known = {"openai": openai, "key": key}
            assert "http://127.0.0.1:8000/v1" in snippet and "http://127.0.0.1:8000/" in command
            asked = snippet.replace("http://127.0.0.1:8000/v1", url).replace("\nclient.chat", "\nanswer = client.chat")
            exec(asked, known)
        finally:
            server.terminate()
    assert known["answer"].choices[0].message.content  # type: ignore[attr-defined]


def test_the_card_states_data_scores_and_lineage(result: dict[str, Any]) -> None:
    card = (Path(result["models"]["chat"]) / "README.md").read_text()
    for expected in ("## Data", "stories", "world-chat-messages", "bits per byte", "| world |", "803,968 parameters"):
        assert expected in card
    for name in ("sample", "tokenizer", "shards", "chat_shards", "pretrain", "finetune", "evaluate"):
        assert result["stages"][name]["fingerprint"] in card
