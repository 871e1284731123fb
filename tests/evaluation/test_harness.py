"""The harness's own Hugging Face backend is the judge of every answer; its own YAML says what is asked."""

import itertools
import json
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from pytest import CaptureFixture

from tests.conftest import write_random_model
from tests.test_model import CONFIG
from vectorclm.__main__ import main
from vectorclm.corpus.sources import TaskSource
from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation.harness import VectorCLM
from vectorclm.evaluation.harness_tasks import build_tasks, harness_scores
from vectorclm.evaluation.item_scores import ItemScores
from vectorclm.evaluation.sandbox import find_sandbox
from vectorclm.evaluation.tasks import check_tasks, read_task
from vectorclm.runtime.devices import Runtime

NEAR = 1e-4  # nats: of choices as alike as this, either may come first
WORDS = [
    "the",
    "otter",
    "swims",
    "by",
    "lake",
    "at",
    "night",
    "and",
    "makes",
    "12",
    "boats",
    "wer",
    "singt",
    "im",
    "wald",
    "fox",
    "bear",
    "owl",
    "hare",
]


@pytest.fixture(scope="module")
def folder(tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights."""
    config = CONFIG.model_copy(update={"max_position_embeddings": 96})
    return write_random_model(tmp_path_factory.mktemp("model"), tiny_text, config, 20_000, chat=False)


@pytest.fixture(scope="module")
def ours(folder: Path) -> VectorCLM:
    return VectorCLM(folder, batch_size=5)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> HFLM:
    return HFLM(str(folder), device="cpu", dtype="float32", batch_size=5)


def said(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def rows_of(task: str) -> list[dict[str, Any]]:
    """Some items in the columns of the hub; the first is longer than the model's context."""
    lengths = [120, *(3 + n for n in range(11))]
    match task:
        case "hellaswag":
            return [
                {"activity_label": "A", "ctx_a": said(n, length) + ".", "ctx_b": said(n + 50, 2), "label": str(n % 4)}
                | {"endings": [f"{said(4 * n + k + 100, 2 + k)} [step] on." for k in range(4)]}
                for n, length in enumerate(lengths)
            ]
        case "winogrande":
            return [
                {"sentence": f"{said(n, length)} _ {said(n + 1, 3)}.", "option1": "otter", "option2": "fox bear"}
                | {"answer": str(1 + n % 2)}
                for n, length in enumerate(lengths)
            ]
        case "boolq":
            return [
                {"passage": said(n, length), "question": said(n + 1, 4), "label": n % 2}
                for n, length in enumerate(lengths)
            ]
        case "lambada_openai":
            return [{"text": said(n, length)} for n, length in enumerate(lengths)]
        case "copa":
            sides = [{"choice1": "The fox swims.", "choice2": f"{said(n, 3)}."} for n in range(12)]
            return [
                {"premise": f"{said(n + 9, 5)}.", "question": ("cause", "effect")[n % 2], "label": n % 2, **side}
                for n, side in enumerate(sides)
            ]
    return [{"sentence_good": said(n, 6), "sentence_bad": said(n + 1, 5), "UID": "adjunct_island"} for n in range(12)]


TASKS = ("hellaswag", "winogrande", "boolq", "lambada_openai", "copa", "blimp_adjunct_island")


def by_item(lm: Any, source: TaskSource, rows: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    answers = lm_eval.evaluate(lm, {"tasks": build_tasks(source, rows)}, bootstrap_iters=0)
    (samples,) = answers["samples"].values()
    return list(samples)


@pytest.mark.parametrize("name", TASKS)
def test_every_item_scores_what_the_hugging_face_backend_says(name: str, ours: VectorCLM, theirs: HFLM) -> None:
    source = TaskSource(label=name, path="json", task=name, split="test", shots=0)
    mine, judged = by_item(ours, source, rows_of(name)), by_item(theirs, source, rows_of(name))
    assert len(mine) == len(judged) == 12
    for a, b in zip(mine, judged, strict=True):
        assert a["arguments"] == b["arguments"]
        values = [[answer[0][0] for answer in sample["resps"]] for sample in (a, b)]
        assert values[0] == pytest.approx(values[1], abs=NEAR)
        ordered = sorted(values[1])
        if all(high - low > NEAR for low, high in itertools.pairwise(ordered)):
            assert [a.get(key) for key in ("acc", "acc_norm")] == [b.get(key) for key in ("acc", "acc_norm")]


def test_worked_examples_are_the_harness_own_and_never_the_item(ours: VectorCLM) -> None:
    source = TaskSource(label="boolq", path="json", task="boolq", split="test", shots=2)
    for sample in by_item(ours, source, rows_of("boolq")):
        context = sample["arguments"][0][0]
        assert context.count("\nAnswer:") == 3 and context.count(f"{sample['doc']['passage']}\nQuestion") == 1


def test_a_suite_of_the_users_takes_the_model_as_it_is(folder: Path) -> None:
    """What anyone writes, on a task of their own."""
    task = {
        "task": "mine",
        "dataset_path": "json",
        "custom_dataset": lambda **_: {"test": __import__("datasets").Dataset.from_list(rows_of("blimp"))},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    }
    found = lm_eval.simple_evaluate(model=VectorCLM(folder), tasks=[task], bootstrap_iters=0)
    assert found["n-samples"]["mine"]["effective"] == 12 and 0 <= found["results"]["mine"]["acc,none"] <= 1


def test_whole_texts_cost_what_the_hugging_face_backend_says(folder: Path, ours: VectorCLM) -> None:
    # With BOS added by its tokenizer, the backend would score BOS itself once more, after BOS.
    judge = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    texts = [said(n, length) for n, length in enumerate((1, 30, 90, 400))]
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    judge.tokenizer._tokenizer.post_processor = None
    assert ours.loglikelihood_rolling(requests) == pytest.approx(judge.loglikelihood_rolling(requests), rel=1e-5)


def test_answers_are_those_of_the_hugging_face_backend(ours: VectorCLM, theirs: HFLM) -> None:
    settings = {"until": ["\n\n", " zzz"], "max_gen_toks": 24, "do_sample": False}
    contexts = [said(n, length) for n, length in enumerate((1, 4, 9, 2, 14, 200, 6))]
    requests = [Instance("generate_until", {}, (context, settings), 0) for context in contexts]
    free = ours.generate_until(requests)
    assert free == theirs.generate_until(requests) and all(free)
    stop = free[1][3:6]  # now ended by what the second answer holds
    requests = [Instance("generate_until", {}, (context, {**settings, "until": [stop]}), 0) for context in contexts]
    cut = ours.generate_until(requests)
    assert cut == theirs.generate_until(requests) == [text.partition(stop)[0] for text in free]
    drawn = {**settings, "do_sample": True, "temperature": 1.5}
    sampled = [Instance("generate_until", {}, (context, drawn), 0) for context in ("The fox", "The fox", "The owl")]
    answers = ours.generate_until(sampled)
    assert answers == ours.generate_until(sampled) and answers[0] != answers[1]
    assert ours.generate_until(sampled[2:]) == answers[2:]
    with pytest.raises(ConfigError, match="generation here has no num_beams"):
        ours.generate_until([Instance("generate_until", {}, ("The fox", {**settings, "num_beams": 2}), 0)])


def test_a_chat_model_is_asked_in_its_template_and_a_base_model_is_not(chat_folder: Path, ours: VectorCLM) -> None:
    lm, judge = VectorCLM(chat_folder), HFLM(str(chat_folder), device="cpu", dtype="float32")
    history = [{"role": "user", "content": "Where does the fox live? <|im_end|>"}]
    asked = lm.apply_chat_template(history)
    assert asked == judge.apply_chat_template(history)
    ids = lm._prompt(asked, 500)
    assert ids.count(3) == 1 and ids.count(2) == 2  # `<|im_end|>` in a message is text, not the end of a turn
    plain = lm.apply_chat_template([{"role": "user", "content": "Where does the fox live?"}])
    requests = [Instance("generate_until", {}, (plain, {"until": [], "max_gen_toks": 16}), 0)]
    assert lm.generate_until(requests) == judge.generate_until(requests)
    choices = [Instance("loglikelihood", {}, (plain, text), 0) for text in ("The fox", "A boat.")]
    values = [[value for value, _ in model.loglikelihood(choices)] for model in (lm, judge)]
    assert values[0] == pytest.approx(values[1], abs=NEAR)
    source = TaskSource(label="boolq", path="json", task="boolq", split="test", shots=1)
    scores = harness_scores(lm, source, build_tasks(source, rows_of("boolq")), 1, ItemScores(), template=True)
    assert scores["items"] == 12 and all(text.count("<|im_start|>") == 4 for text in list(lm._conversations)[2:])
    with pytest.raises(DataError, match="is a base model and knows no chat template"):
        ours.apply_chat_template(history)


def test_a_group_is_scored_over_all_its_items_with_a_seeded_draw(ours: VectorCLM) -> None:
    names = ["high_school_physics", "astronomy"]
    source = TaskSource(label="x", path="json", task="mmlu_astronomy_continuation", split="test", subset="subject")
    rows = [
        {
            "question": said(n, 5),
            "subject": names[n % 2],
            "choices": [said(n + k, 2) for k in range(4)],
            "answer": n % 4,
        }
        for n in range(30)
    ]
    found = ItemScores()
    scores = harness_scores(ours, source, build_tasks(source, rows), 1, found)
    assert scores["items"] == 15 and scores["chance"] == 0.25 and set(scores["parts"]) == {source.task}
    limited = source.model_copy(update={"limit": 6})
    drawn = [ItemScores() for _ in range(2)]
    again = [harness_scores(ours, limited, build_tasks(limited, rows), 1, one) for one in drawn]
    assert again[0] == again[1] and again[0]["items"] == 6 and drawn[0].items == drawn[1].items
    assert {item["item"] for item in drawn[0].items} <= {item["item"] for item in found.items}
    whole = source.model_copy(update={"task": "mmlu_continuation"})
    with pytest.raises(DataError, match=r"x: no rows for mmlu_\w+_continuation where subject is "):
        build_tasks(whole, rows)


@pytest.mark.usefixtures("sandboxed")
def test_programs_are_tested_and_only_where_that_is_allowed(
    ours: VectorCLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = TaskSource(label="humaneval", path="json", task="humaneval", split="test", runs_code=True)
    row = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1\n"}
    found = ItemScores()
    monkeypatch.setattr(ours, "generate_until", lambda requests: ["    return 1", "    return 2"])
    scores = harness_scores(ours, source, build_tasks(source, [row, row]), 1, found)
    assert scores["metric"] == "pass@1" and scores["acc"] == 0.5 and found.items[0]["answer"] == "    return 1"
    with pytest.raises(ConfigError, match=r"humaneval runs what the model writes: set runs_code = true"):
        check_tasks([source.model_copy(update={"runs_code": False})])
    with pytest.raises(DataError, match=r"needs prompt, entry_point, test as texts; .* lack entry_point, test"):
        build_tasks(source, [{"prompt": "def one():\n"}])
    with no_sandbox(tmp_path, monkeypatch):
        with pytest.raises(ConfigError, match="--allow-unsandboxed runs the programs without a sandbox"):
            build_tasks(source, [row])
        assert build_tasks(source, [row], Runtime(allow_unsandboxed=True))


@contextmanager
def no_sandbox(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A system where bubblewrap is not installed."""
    try:
        with monkeypatch.context() as changed:
            changed.setenv("PATH", str(folder))
            find_sandbox.cache_clear()
            yield
    finally:
        find_sandbox.cache_clear()


@pytest.mark.usefixtures("sandboxed")
def test_without_a_sandbox_a_task_is_not_run_and_the_others_are(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CaptureFixture[str]
) -> None:
    suite = write_suite(tmp_path)
    row = {"prompt": "def one():\n", "entry_point": "one", "test": "def check(f):\n    assert f() == 1\n"}
    (tmp_path / "code.jsonl").write_text(json.dumps(row) + "\n")
    suite.write_text(
        suite.read_text().replace('"o/code", "mirror": "lambada.jsonl"', '"o/code", "mirror": "code.jsonl"')
    )
    options = ["--suite", str(suite), "--data", str(tmp_path), "--store", str(tmp_path / "store"), "--run-code"]

    def measured(*more: str) -> tuple[dict[str, Any], str]:
        assert main(["evaluate", str(folder), *options, "--json", *more]) == 0
        done = capsys.readouterr()
        return json.loads(done.out), done.err

    with no_sandbox(tmp_path, monkeypatch):
        found, printed = measured()
        assert (
            "code not run: it runs programs that the model writes, and there is no sandbox here: bubblewrap" in printed
        )
        assert list(found["not_run"]) == ["code"] == found["scores"]["not_run"]
        assert set(found["scores"]["tasks"]) == {"lambada"} and "wiki" in found["scores"]["text"]
        assert main(["evaluate", str(folder), *options]) == 0
        assert "acc.code                 not run\n" in capsys.readouterr().out
        risked, printed = measured("--allow-unsandboxed")
        assert "not run" not in printed and "not_run" not in risked and risked["scores"]["tasks"]["code"]["acc"] == 0
    again, printed = measured()  # with a sandbox, the same question finds what was measured, not what was left out
    assert again["scores"]["tasks"]["code"]["items"] == 1 and "not_run" not in again["scores"]
    assert again["uri"] == risked["uri"] != found["uri"]


def write_suite(folder: Path, **changes: Any) -> Path:
    """A suite of local files in other columns than the hub's."""
    passages = [{"context": said(n, 6), "continuation": said(n + 1, 1)} for n in range(9)]
    (folder / "lambada.jsonl").write_text("".join(json.dumps(row) + "\n" for row in passages))
    (folder / "wiki.txt").write_text(
        " \n = Otter = \n \n Otters swim . \n = = Food = = \n Fish . \n = Fox = \n It runs . \n"
    )
    tasks = [
        {"label": "lambada", "task": "lambada_openai", "path": "o/lambada", "split": "test", "mirror": "lambada.jsonl"}
        | {"columns": {"text": "context ~ ' ' ~ continuation"}, **changes},
        {"label": "wiki", "task": "wikitext", "path": "o/wikitext", "split": "test", "mirror": "wiki.txt"},
        {"label": "code", "task": "humaneval", "path": "o/code", "mirror": "lambada.jsonl", "runs_code": True},
    ]
    path = folder / "suite.json"
    path.write_text(json.dumps({"name": "own", "tasks": tasks}))
    return path


def test_a_suite_of_local_files_is_measured_and_kept(folder: Path, tmp_path: Path, capsys: CaptureFixture[str]) -> None:
    suite = write_suite(tmp_path)
    options = ["--suite", str(suite), "--data", str(tmp_path), "--store", str(tmp_path / "store"), "--json"]
    assert main(["evaluate", str(folder), *options]) == 0
    done = capsys.readouterr()
    assert "code not run: it runs programs that the model writes; add --run-code" in done.err
    scores = json.loads(done.out)["scores"]
    assert scores["tasks"]["lambada"]["items"] == 9 and scores["tasks"]["lambada"]["others"]["perplexity"] > 1
    assert scores["text"]["wiki"]["documents"] == 2 and scores["text"]["wiki"]["bits_per_byte"] > 0
    wiki = TaskSource(label="w", path="x", task="wikitext", mirror="wiki.txt")
    pages = [row["page"] for row in read_task(wiki, tmp_path, None)]
    assert pages == [" = Otter = \n \n Otters swim . \n = = Food = = \n Fish . ", " = Fox = \n It runs . \n"]
    assert main(["evaluate", str(folder), *options]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "reused"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"task": "lambada_opena"}, "has no task 'lambada_opena'; did you mean lambada_openai"),
        ({"columns": {"text": "context ~"}}, "'context ~' is not a Jinja expression"),
        ({"columns": {"text": "nothing ~ context.x"}}, "text cannot be computed from a row with context, continuation"),
        (
            {"columns": {}},
            "lambada_openai reads a column that its rows lack ('text' is undefined): context, continuation",
        ),
        ({"task": "blimp"}, "blimp is a group of 67 tasks: set `subset`"),
        ({"task": "mathqa", "mirror": "gone.jsonl"}, "o/lambada: the mirror has no lambada"),
        ({"format": "arc"}, "format: unknown key"),
    ],
)
def test_a_mistake_in_a_suite_is_told_before_the_work(
    changes: dict[str, Any], told: str, folder: Path, tmp_path: Path, capsys: CaptureFixture[str]
) -> None:
    suite = write_suite(tmp_path, **changes)
    main(["evaluate", str(folder), "--suite", str(suite), "--data", str(tmp_path), "--store", str(tmp_path / "store")])
    assert told in capsys.readouterr().err


def test_a_base_model_is_not_asked_in_a_template(folder: Path, tmp_path: Path, capsys: CaptureFixture[str]) -> None:
    suite = write_suite(tmp_path)
    options = ["--suite", str(suite), "--data", str(tmp_path), "--store", str(tmp_path / "store"), "--template"]
    assert main(["evaluate", str(folder), *options]) == 2
    assert "is a base model and knows no chat template: leave --template out" in capsys.readouterr().err


def test_without_the_harness_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    for name in ("harness", "harness_tasks"):
        monkeypatch.delitem(sys.modules, f"vectorclm.evaluation.{name}")
        monkeypatch.delattr(f"vectorclm.evaluation.{name}")
    check_tasks([TaskSource(label="own", path="json")])  # needs none
    with pytest.raises(ConfigError, match=r"which is not installed: pip install .*'vectorclm\[eval\]'"):
        check_tasks([TaskSource(label="x", path="json", task="hellaswag")])


def test_a_model_with_anothers_tokenizer_is_refused(folder: Path, chat_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((chat_folder / name).read_bytes())
    with pytest.raises(DataError, match="the tokenizer has 320 tokens, the model 307: copy both from one training"):
        VectorCLM(tmp_path)


def test_a_padded_batch_goes_on_as_each_prompt_alone(ours: VectorCLM) -> None:
    from vectorclm.inference.generate import generate, generate_batch

    prompts = [[0, *range(10, 10 + length)] for length in (1, 5, 9)]
    padded = torch.tensor([[4] * (10 - len(prompt)) + prompt for prompt in prompts])
    padding = torch.tensor([10 - len(prompt) for prompt in prompts])
    made = generate_batch(ours.model, padded, 20, stop_ids=(), padding_B=padding).tolist()
    assert made == [list(generate(ours.model, prompt, 20, stop_ids=())) for prompt in prompts]
