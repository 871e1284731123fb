"""Any model on any suite, by the core alone."""

import json
import math
import random
import shutil
from pathlib import Path
from statistics import pstdev
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from flows.cli import main as vectorclm
from flows.reports.report import report
from flows.tracking.registry import Registry
from tests.test_curriculum import mini
from vectorclm.__main__ import main
from vectorclm.comparison.compare import OWN_SUITE, common_results, compare
from vectorclm.comparison.config import Limits
from vectorclm.comparison.curves import curves_of
from vectorclm.comparison.measurement import left_out, measure_plan, training_text
from vectorclm.config import Suite, override
from vectorclm.corpus.sample_reader import read_texts
from vectorclm.corpus.synthetic_world import rows as world_rows
from vectorclm.errors import ConfigError, CorruptArtifactError, DataError, StoreError
from vectorclm.evaluation.bits_per_byte import text_scores
from vectorclm.evaluation.multiple_choice import read_items
from vectorclm.evaluation.statistics import Change, Figure, changes, figures, ratio, share_error
from vectorclm.lineage.chain import lineage, trained_on
from vectorclm.lineage.pinning import pin
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store
from vectorclm.store.model_ref import expand_prefix, find_model
from vectorclm.tokenizer import encode, load_tokenizer

STAGES_OF_SCORES = ("evaluate_base", "evaluate")
STAGES = ("sample", "tokenizer", "shards", "chat_shards", "pretrain", "finetune")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A store with a very small base and chat model, and the suite that they belong to."""
    folder = tmp_path_factory.mktemp("evaluations")
    path, store = folder / "mini.json", Store(str(folder / "store"))
    path.write_text(mini().model_dump_json())
    (folder / "runtime.json").write_text('{"threads": 1}')
    suite, _ = pin(mini(), path, None, resolve=True)
    runtime = Runtime(threads=1, keep_checkpoints=True, checkpoint_interval=6)
    for stage in STAGES:
        run_stage(stage, suite, store, runtime, None)
    uris = {stage: store.uri_of(f"{stage}/{plan.fingerprint}") for stage, plan in plans(suite).items()}
    return SimpleNamespace(path=path, runtime=folder / "runtime.json", store=store, suite=suite, uris=uris)


class Evaluate:
    """`python -m vectorclm evaluate`, in this process."""

    def __init__(self, made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
        self.made, self.capsys = made, capsys

    def __call__(self, model: str, *options: str) -> SimpleNamespace:
        place = ["--store", self.made.store.uri, "--runtime", str(self.made.runtime)]
        code = main(["evaluate", model, *place, *options])
        said = self.capsys.readouterr()
        return SimpleNamespace(code=code, out=said.out, err=said.err)

    def scores(self, model: str, *options: str) -> dict[str, Any]:
        done = self(model, "--suite", str(self.made.path), "--json", *options)
        assert done.code == 0, done.err
        return dict(json.loads(done.out))


@pytest.fixture
def evaluate(made: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> Evaluate:
    return Evaluate(made, capsys)


def test_a_chat_model_is_measured_once_wherever_it_lies(
    made: SimpleNamespace, evaluate: Evaluate, tmp_path: Path
) -> None:
    first = evaluate.scores(made.uris["finetune"], "--documents", "5")
    assert first["state"] == "built"
    assert (Path(first["uri"]) / "manifest.json").is_file()
    scores = first["scores"]
    assert set(scores["text"]) == {"stories", "lessons"} and set(scores["tasks"]) == {"world", "world-two-step"}
    assert scores["tasks"]["world"]["items"] == 8 and scores["chat"]["prompts"] == 3 and len(scores["samples"]) == 3
    shutil.copytree(made.uris["finetune"], tmp_path / "copy")
    again = evaluate.scores(str(tmp_path / "copy"), "--documents", "5", "--items", "8")
    assert again == {**first, "state": "reused"}
    assert evaluate.scores(str(tmp_path / "copy"), "--documents", "5", "--items", "4")["state"] == "built"


def test_a_foreign_store_cannot_borrow_the_scores_of_another_model(
    made: SimpleNamespace, evaluate: Evaluate, tmp_path: Path
) -> None:
    options = ["--suite", str(made.path), "--items", "2", "--documents", "2"]
    assert evaluate(made.uris["finetune"], *options).code == 0
    key = Path(made.uris["finetune"]).relative_to(made.store.root)
    shutil.copytree(made.uris["finetune"], tmp_path / key)
    assert "measure reused" in evaluate(f"file://{tmp_path / key}", *options).out
    shutil.copyfile(Path(made.uris["pretrain"]) / "model.safetensors", tmp_path / key / "model.safetensors")
    done = evaluate(f"file://{tmp_path / key}", *options)
    assert done.code == 2 and "model.safetensors: SHA-256 is" in done.err and "reused" not in done.out
    shutil.copyfile(Path(made.uris["finetune"]) / "model.safetensors", tmp_path / key / "model.safetensors")
    config = (tmp_path / key / "tokenizer_config.json").read_text()
    (tmp_path / key / "tokenizer_config.json").write_text(config.replace("im_end", "xx_end"))
    for address in (f"file://{tmp_path / key}", str(tmp_path / key)):
        with pytest.raises(CorruptArtifactError, match=r"tokenizer_config\.json differs from the manifest"):
            find_model(address)
    shutil.copytree(made.uris["finetune"], tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer_config.json").write_text('{"eos_token": {}}')
    with pytest.raises(DataError, match="names no eos_token"):
        find_model(str(tmp_path / "plain"))


def test_held_out_text_is_scored_as_a_whole_with_its_error(made: SimpleNamespace, evaluate: Evaluate) -> None:
    scores = evaluate.scores(made.uris["pretrain"])["scores"]
    assert "chat" not in scores
    folder = Path(made.uris["pretrain"])
    model, tokenizer = CausalLM.from_pretrained(folder), load_tokenizer(folder)
    texts = list(read_texts(Path(made.uris["sample"]) / "stories", "validation"))
    each = [text_scores(model, tokenizer, text, torch.device("cpu")) for text in texts]
    bits = sum(score["bits_per_byte"] * score["bytes"] for score in each)
    found = scores["text"]["stories"]
    assert (found["documents"], found["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))
    assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"], rel=1e-6)
    drawn = []  # the error is how much the figure moves with the documents that are drawn
    for seed in range(300):
        chosen = random.Random(seed).choices(each, k=len(each))
        sizes = sum(score["bytes"] for score in chosen)
        drawn.append(sum(score["bits_per_byte"] * score["bytes"] for score in chosen) / sizes)
    assert len(texts) >= 4
    assert found["stderr"] == pytest.approx(pstdev(drawn), rel=0.5)


def test_two_models_are_compared_on_the_same_items(
    made: SimpleNamespace, evaluate: Evaluate, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base, chat = made.uris["pretrain"], made.uris["finetune"]
    options = ["--documents", "6", "--items", "40"]
    results = [evaluate.scores(model, *options) for model in (base, chat)]
    command = ["compare", base, chat, "--store", made.store.uri, "--suite", "mini", "--json"]
    assert main(command) == 0
    said = capsys.readouterr().out
    found = json.loads(said)
    assert (found["before"], found["after"]) == tuple(result["uri"] for result in results)
    scores = {score["score"]: score for score in found["scores"]}
    tasks, parts = ("", ".world", ".world-two-step"), ("", ".stories", ".lessons")
    assert set(scores) == {
        *(f"{name}{task}" for name in ("acc", "acc_norm") for task in tasks),
        *(f"bits_per_byte{part}" for part in parts),
        *("followed", "followed_content", "followed_form"),
    }
    rows = [pq.read_table(Path(result["uri"]) / "items.parquet").to_pylist() for result in results]
    changed = [b["correct"] - a["correct"] for a, b in zip(*rows, strict=True) if a["task"] == "world"]
    assert len(changed) == 40 and scores["acc.world"]["differing"] == sum(map(abs, changed))
    assert scores["acc.world"]["difference"] == pytest.approx(sum(changed) / 40)
    for name, key in (("acc.world", "acc"), ("acc_norm.world", "acc_norm")):
        sides = [result["scores"]["tasks"]["world"] for result in results]
        assert [scores[name][side]["stderr"] for side in ("before", "after")] == [
            pytest.approx(share_error(side[key], side["items"])) for side in sides
        ]
    assert main(command) == 0 and capsys.readouterr().out == said
    evaluate.scores(base, "--documents", "6", "--items", "3")
    assert main([*command[:-1]]) == 0 and " of 40 " in capsys.readouterr().out  # of most questions
    assert main(["compare", base, chat, "--store", str(tmp_path)]) == 2
    assert f"run `vectorclm evaluate {base} --suite NAME --store {tmp_path}`" in capsys.readouterr().err
    assert main([*command[:-2], "small"]) == 2
    assert "small has measured both by the same questions" in capsys.readouterr().err


def test_the_stages_keep_their_items_with_every_error(made: SimpleNamespace) -> None:
    stages = [run_stage(name, made.suite, made.store, Runtime(threads=1), None)[0] for name in STAGES_OF_SCORES]
    for scores in (stage.summary for stage in stages):
        for label, text in scores["text"].items():
            assert text["bits_per_byte"] == pytest.approx(scores["bits_per_byte"][label], rel=1e-9)
            assert text["stderr"] > 0 and text["windows"] > 1 and text["bytes"] > 0
    found = {change.name: change for change in compare(*stages)}  # by its own evaluation, base and chat alike
    assert common_results(made.uris["pretrain"], made.uris["finetune"], made.store, OWN_SUITE) == tuple(stages)
    bits = [stage.summary["bits_per_byte"]["stories"] for stage in stages]
    assert found["bits_per_byte.stories"].difference == pytest.approx(bits[1] - bits[0])


def test_the_penalty_is_of_all_answers_of_both_models(made: SimpleNamespace) -> None:
    tokenizer = load_tokenizer(Path(made.uris["finetune"]))
    for stage in STAGES_OF_SCORES:
        repeated: dict[tuple[str, float], int] = {}
        for penalty in (1.0, 100.0):
            suite = override(made.suite, [f"evaluate.repetition_penalty={penalty}"])
            scores, _ = run_stage(stage, suite, made.store, Runtime(threads=1), None)
            instructions = (scores.local() / "instructions.jsonl").read_text().splitlines()
            answers = {"samples": scores.summary["samples"], "instructions": map(json.loads, instructions)}
            for kind, rows in answers.items():
                ids = [encode(tokenizer, row["answer"]) for row in rows]
                repeated[kind, penalty] = sum(len(answer) - len(set(answer)) for answer in ids)
        assert all(repeated[kind, 100.0] < repeated[kind, 1.0] / 4 for kind in ("samples", "instructions")), repeated


def test_what_training_repeats_is_counted_beside_the_score(
    made: SimpleNamespace, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = evaluate.scores(made.uris["finetune"], "--items", "5")["scores"]["tasks"]["world"]
    assert task["contaminated"] == 0 and task["acc_clean"] == task["acc"]  # the sample was cleared of its questions
    model, tokenizer = find_model(made.uris["finetune"]), load_tokenizer(Path(made.uris["finetune"]))
    read = trained_on(model, made.store)
    assert set(read) == {"sample", "chat_shards"}
    texts = [text.decode() for text in training_text(read, tokenizer)]
    assert set(read_texts(Path(made.uris["sample"]) / "stories", "train")) <= set(texts)
    assert sum("assistant\n" in text for text in texts) > 20  # the conversations, in windows
    question = read_items(made.suite.evaluate.tasks[0], world_rows(made.suite.world, "questions"), 1)[0]
    monkeypatch.setattr("vectorclm.comparison.measurement.training_text", lambda *_: iter([question.context.encode()]))
    again = evaluate.scores(made.uris["pretrain"], "--items", "400")
    task, rows = again["scores"]["tasks"]["world"], pq.read_table(Path(again["uri"]) / "items.parquet").to_pylist()
    assert task["contaminated"] == sum(bool(row["contaminated"]) for row in rows) > 0
    clean = [row["correct"] for row in rows if row["task"] == "world" and not row["contaminated"]]
    assert task["acc_clean"] == pytest.approx(sum(clean) / len(clean))


def test_every_checkpoint_is_a_point_of_a_curve(made: SimpleNamespace, evaluate: Evaluate) -> None:
    options = ["--every-checkpoint", "--documents", "4", "--items", "6", "--json"]
    done = evaluate(str(made.path), *options)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [(stage, step) for stage, step, _ in found["points"]][:3] == [
        ("pretrain", 6), ("pretrain", 12), ("pretrain", 16)
    ]  # fmt: skip
    rows = pq.read_table(found["uri"]).to_pylist()
    curve = {row["step"]: row["value"] for row in rows if row["score"] == "bits_per_byte.stories"}
    assert len(set(curve.values())) > 2 and {row["stage"] for row in rows} == {"pretrain", "finetune"}
    model = evaluate.scores(made.uris["pretrain"], "--documents", "4", "--items", "6")
    assert model["state"] == "reused" and model["uri"] == found["points"][2][2]
    assert model["scores"]["text"]["stories"]["bits_per_byte"] == curve[16]
    drawn = curves_of(made.store.find("pretrain", made.uris["pretrain"].rpartition("/")[2]))
    assert dict(drawn["mini"]["bits_per_byte.stories"]) == {
        row["step"]: row["value"]
        for row in rows
        if row["score"] == "bits_per_byte.stories" and row["step"] <= 16 and row["stage"] == "pretrain"
    }
    page = report(lineage(made.uris["finetune"], made.store), made.store)
    assert page.count("<h3>Checkpoints on mini, bits per byte</h3>") == 2  # pretraining and tuning
    assert page.count("<h3>Checkpoints on mini, accuracy</h3>") == 2
    other = evaluate("tiny", *options)
    assert other.code == 2 and "train with keep_checkpoints = true in --runtime FILE" in other.err


def test_an_experiment_with_changes_is_named_by_them_again(
    made: SimpleNamespace, evaluate: Evaluate, tmp_path: Path
) -> None:
    (tmp_path / "mini.json").write_text(override(mini(), ["seed=77"]).model_dump_json())
    back = ["--set", f"seed={mini().seed}"]
    options = ["--every-checkpoint", "--documents", "4", "--items", "6", "--json"]
    assert evaluate(str(tmp_path / "mini.json"), *options).code == 2
    done = evaluate(str(tmp_path / "mini.json"), *options, *back)
    assert done.code == 0 and json.loads(done.out)["points"][2][:2] == ["pretrain", 16]
    assert main(["pretrain", str(tmp_path / "mini.json"), "--store", made.store.uri, *back]) == 0
    assert f"pretrain reused: {made.uris['pretrain']}" in evaluate.capsys.readouterr().out
    refused = evaluate(made.uris["pretrain"], "--suite", "tiny", *back)
    assert refused.code == 2 and "--set changes an experiment" in refused.err


def test_what_the_store_lacks_is_told_and_measured_once_it_is_there(
    made: SimpleNamespace, evaluate: Evaluate, tmp_path: Path
) -> None:
    done = evaluate(made.uris["finetune"], "--suite", str(made.path), "--json", "--store", str(tmp_path))
    assert done.code == 0
    assert "bits per byte not measured: the store has no finished sample of mini" in done.err
    assert "answers in the template not measured" in done.err
    scores = json.loads(done.out)["scores"]
    assert scores["text"] == {} and "chat" not in scores and scores["tasks"]["world"]["items"] == 8
    model = find_model(made.uris["finetune"])
    suite = Suite.of(made.suite)
    plan = measure_plan(suite, Limits(), model, made.store)
    assert left_out(plan, suite) == []
    assert plan.fingerprint != measure_plan(suite, Limits(), model, Store(str(tmp_path))).fingerprint


def test_settings_and_limits_are_part_of_a_result_and_the_machine_is_not(made: SimpleNamespace) -> None:
    model = find_model(made.uris["pretrain"])
    suite = Suite.of(made.suite)
    plan = measure_plan(suite, Limits(), model, made.store)
    same = Limits(items=8, prompts=3, max_new_tokens=8)  # what the suite says by itself
    assert measure_plan(suite, same, model, made.store).fingerprint == plan.fingerprint
    for limits in (Limits(items=7), Limits(documents=7), Limits(prompts=7), Limits(max_new_tokens=7)):
        assert measure_plan(suite, limits, model, made.store).fingerprint != plan.fingerprint
    other = Suite.of(override(made.suite, ["pretrain.batch_size=4"]))  # of the training, nothing is
    assert measure_plan(other, Limits(), model, made.store).fingerprint == plan.fingerprint
    assert find_model(made.uris["finetune"]).content != model.content


def test_a_wrong_address_is_told_before_any_work(made: SimpleNamespace, evaluate: Evaluate, tmp_path: Path) -> None:
    store, print_ = made.store.uri, plans(made.suite)["pretrain"].fingerprint
    with pytest.raises(DataError, match="there is no folder /nowhere/model"):
        find_model("/nowhere/model")
    with pytest.raises(DataError, match=r"is not a model directory: it lacks config\.json"):
        find_model(str(tmp_path))
    shutil.copytree(made.uris["pretrain"], tmp_path / "base")
    with pytest.raises(DataError, match=f"the models in it are {tmp_path}/base"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match="known only to MLflow"):
        find_model("models:/vectorclm-chat@candidate")
    with pytest.raises(ConfigError, match="a model in a store is <store>/<stage>/<fingerprint>"):
        find_model("memory://pretrain")
    with pytest.raises(DataError, match="has no finished finetune/"):
        find_model(f"file://{store}/finetune/{print_}")
    with pytest.raises(DataError, match="is not a model directory"):
        find_model(f"file://{made.uris['sample']}")
    with pytest.raises(StoreError, match="nosuchfs://bucket cannot be"):
        find_model(f"nosuchfs://bucket/pretrain/{print_}")
    assert find_model(f"file://{made.uris['pretrain']}").content == find_model(made.uris["pretrain"]).content
    done = evaluate(made.uris["pretrain"], "--items", "3")
    assert done.code == 2 and "--items need --suite NAME" in done.err
    done = evaluate(made.uris["pretrain"], "--suite", "tinny")
    assert (
        done.code == 2 and "no suite 'tinny': use generation, standard, an experiment (base, small, tiny)" in done.err
    )
    done = evaluate(made.uris["pretrain"], "--suite", "tiny", "--documents", "1")
    assert done.code == 2 and "--documents 1: Input should be greater than or equal to 2" in done.err


def test_a_text_is_scored_by_a_model_at_any_address(
    made: SimpleNamespace, evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("Quin is an owl.")
    options = ["--text", str(tmp_path / "text"), "--json"]
    local, remote = (evaluate(f"{scheme}{made.uris['pretrain']}", *options) for scheme in ("", "file://"))
    assert local.code == remote.code == 0, remote.err
    assert json.loads(local.out)["bits_per_byte"] > 0 and local.out == remote.out
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = Registry(made.store).client
    client.create_registered_model("vectorclm-base")
    client.create_model_version("vectorclm-base", made.uris["pretrain"], tags={"uri": made.uris["pretrain"]})
    assert vectorclm(["evaluate", "models:/vectorclm-base/1", "--store", made.store.uri, *options]) == 0
    assert evaluate.capsys.readouterr().out.endswith(local.out)


def test_the_beginning_of_a_fingerprint_is_enough(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    uri, print_ = made.uris["pretrain"], plans(made.suite)["pretrain"].fingerprint
    monkeypatch.setenv("VECTORCLM_STORE", made.store.uri)
    for address in (uri[:-52], f"file://{uri[:-52]}/", f"pretrain/{print_[:12]}"):
        short, whole = find_model(address), find_model(uri)
        assert (short.address, short.content, short.inside) == (whole.address, whole.content, whole.inside)
    remote = Store("memory://beginnings")
    for end in "01":
        remote.write(f"finetune/abc{end * 61}/x", b"")
    candidates = r"finetune/abc0{9}, finetune/abc1{9}; write more digits"
    with pytest.raises(ConfigError, match=rf"abc matches 2 artifacts of memory://beginnings: {candidates}"):
        find_model("memory://beginnings/finetune/abc")
    assert expand_prefix("memory://beginnings/finetune/abc1/chat") == f"memory://beginnings/finetune/abc{'1' * 61}/chat"
    with pytest.raises(DataError, match="beginnings has no finished finetune/abd"):
        find_model("memory://beginnings/finetune/abd")


def test_a_ratio_and_its_error() -> None:
    assert ratio([10.0, 20.0], [5, 10]) == (2.0, 0.0)  # all documents alike
    value, stderr = ratio([2.0, 4.0, 9.0], [2, 2, 2])  # of equal sizes: the error of a mean
    assert value == 2.5
    assert stderr == pytest.approx(pstdev([1.0, 2.0, 4.5]) / math.sqrt(2))
    assert ratio([3.0], [2]) == (1.5, 1.5)


def test_a_fall_is_what_noise_does_not_explain() -> None:
    def change(name: str, before: float, after: float, stderr: float) -> Change:
        return Change(name, Figure(before, stderr), Figure(after, stderr))

    assert change("acc.world", 0.5, 0.4, 0.03).noise == pytest.approx(2 * math.sqrt(2) * 0.03)
    assert change("acc.world", 0.5, 0.4, 0.03).fell
    assert not change("acc.world", 0.5, 0.4, 0.04).fell
    assert not change("acc.world", 0.4, 0.5, 0.03).fell and change("acc.world", 0.4, 0.5, 0.03).beyond_noise
    assert change("bits_per_byte.stories", 1.0, 1.1, 0.03).fell
    assert not change("bits_per_byte.stories", 1.1, 1.0, 0.03).fell
    assert not change("acc.world", 1.0, 1.0, 0.0).beyond_noise
    task = {"acc": 0.5, "stderr": 0.1, "items": 26}
    chat = {"prompts": 5, "answered_in_template": 4}
    found = figures({"tasks": {"world": task}, "text": {"a": {"bits_per_byte": 2.0, "stderr": 0.2}}, "chat": chat})
    assert found == {
        "acc.world": Figure(0.5, pytest.approx(0.1), 26),
        "bits_per_byte.a": Figure(2.0, 0.2),
        "in_template": Figure(0.8, share_error(0.8, 5), 5),
    }
    assert [item.name for item in changes({"acc.world": Figure(0.4, 0.1)}, found)] == ["acc.world"]
