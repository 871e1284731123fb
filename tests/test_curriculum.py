"""The whole flow from the command line: real Prefect, real MLflow, real stages, a very small experiment."""

import html
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import psutil
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import following
from tests.services import prefect_database
from tests.test_pages import PAGES, fenced
from vectorclm.config import ExperimentConfig, load_experiment, override
from vectorclm.errors import ConfigError
from vectorclm.evaluation.instruction_checks import PARTS
from vectorclm.stages import BY_NAME, TRAININGS
from vectorclm.store.layout import STAGES
from vectorclm.store.storage import LOCK

SHRUNK = {
    "name": "mini",
    "sample.bytes": 400_000,
    "tokenizer.vocab_size": 320,
    "tokenizer.bytes": 100_000,
    "shards.sequence_length": 64,
    "model.vocab_size": 320,
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "model.head_dim": 16,
    "model.max_position_embeddings": 128,
    "pretrain.batch_size": 8,
    "pretrain.validation_interval": 5,
    "pretrain.validation_windows": 4,
    "pretrain.phases": "[{tokens = 8192}]",
    "chat.sequence_length": 128,
    "chat.sources.0.conversations": 60,
    "chat.sources.1.conversations": 60,
    "chat.sources.2.conversations": 60,
    "finetune.epochs": 1.0,
    "finetune.batch_size": 8,
    "finetune.validation_interval": 5,
    "finetune.validation_windows": 4,
    "evaluate.chat_prompts": 3,
    "evaluate.max_new_tokens": 8,
    "evaluate.tasks.0.limit": 8,
    "evaluate.tasks.1.limit": 8,
    "evaluate.instructions": 16,
}
STEPS = 8192 // (8 * 64)


def mini() -> ExperimentConfig:
    tiny, _ = load_experiment("tiny")
    return override(tiny, [f"{key}={value}" for key, value in SHRUNK.items()])


def run_cli(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The command as a user has it, away from whatever servers this machine is set to use."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    command = [sys.executable, "-m", "flows.cli", *arguments]
    return subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One run from nothing, which the tests below look at and build upon."""
    folder = tmp_path_factory.mktemp("curriculum")
    experiment, store = folder / "mini.json", folder / "store"
    experiment.write_text(mini().model_dump_json())

    def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        options = ["--store", str(store), "--json", "--checkpoint-interval", "1000", "--threads", "1"]
        return run_cli("run", str(experiment), *options, *arguments, **environment)

    prefect_database.prepare(store / ".prefect")
    done = run()
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    return SimpleNamespace(
        experiment=experiment,
        store=store,
        run=run,
        done=done,
        result=json.loads(done.stdout),
        client=client,
        runs=lambda query="": client.search_runs([client.get_experiment_by_name("mini").experiment_id], query),
    )


def states(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    assert done.returncode == 0, done.stderr
    return {name: stage["state"] for name, stage in json.loads(done.stdout)["stages"].items()}


def test_the_summary_is_one_object_and_nothing_else(first: SimpleNamespace) -> None:
    assert len(first.done.stdout.splitlines()) == 1
    assert set(first.result) == {"stages", "scores", "models"}
    assert set(first.result["stages"]) == set(STAGES)
    for name, stage in first.result["stages"].items():
        assert set(stage) == {"fingerprint", "uri", "state", "seconds"}
        assert stage["state"] == "built"
        assert stage["uri"] == f"{first.store}/{name}/{stage['fingerprint']}"
        assert (Path(stage["uri"]) / "manifest.json").is_file()
    scores = first.result["scores"]
    tasks = scores["base"]["tasks"]
    assert set(tasks) == {"world", "world-two-step"}
    assert scores["multiple_choice"] == pytest.approx(sum(task["acc"] for task in tasks.values()) / 2)
    by_source = scores["base"]["bits_per_byte"]
    assert set(by_source) == {"stories", "lessons"}
    assert scores["bits_per_byte"] == pytest.approx(sum(by_source.values()) / 2)
    assert scores["chat"]["chat"]["prompts"] == 3


def test_a_finished_run_leaves_no_traceback_and_no_work_behind(first: SimpleNamespace) -> None:
    assert "Traceback" not in first.done.stderr and "Error" not in first.done.stderr
    assert [line.split()[0] for line in first.done.stderr.splitlines() if " built in " in line] != []
    assert list((first.store / "work").iterdir()) == []
    assert list((first.store / "leases").iterdir()) == []


def test_the_store_holds_what_the_page_draws_of_it(first: SimpleNamespace) -> None:
    """Every folder of the run stands there, and each that is made always is in the run."""
    page = PAGES["vectorclm/store/README.md"]
    (tree,) = (block for block in fenced(page) if block.startswith("store/"))
    drawn = {
        name for line in tree.splitlines() for name in re.findall(r"(?:[├└]── |, | )([.\w]+)(?:/|(?=\.db))", line[:38])
    }
    made = {path.stem for path in first.store.iterdir() if path.name != LOCK}  # a database and its lock are one
    assert f"`{LOCK}`" in page
    assert (
        made <= drawn and {*STAGES, "reports", "leases", "work", "locks", ".prefect", "mlflow", "mlartifacts"} <= drawn
    )
    assert set(STAGES) | {"reports", ".prefect", "mlflow"} <= made
    for stage, files in re.findall(r"(\w+)/… +([\w., ]+)$|\Z", tree, re.MULTILINE):
        for name in re.findall(r"\w+\.\w+", files) if stage in STAGES else ():
            assert (Path(first.result["stages"][stage]["uri"]) / name).is_file(), name


def test_the_models_open_with_transformers(first: SimpleNamespace) -> None:
    for directory in first.result["models"].values():
        model = AutoModelForCausalLM.from_pretrained(directory)
        ids = AutoTokenizer.from_pretrained(directory)("Pim is an otter.", return_tensors="pt").input_ids
        with torch.no_grad():
            assert torch.isfinite(model(ids).logits).all()


def test_prefect_keeps_a_task_a_stage(first: SimpleNamespace) -> None:
    with closing(sqlite3.connect(first.store / ".prefect" / "prefect.db")) as database:
        found = dict(database.execute("select name, state_type from task_run where state_name = 'Completed'"))
    assert found == dict.fromkeys(STAGES, "COMPLETED")


def test_mlflow_has_a_run_for_the_curriculum_and_one_a_stage(first: SimpleNamespace) -> None:
    parents = first.runs("tags.stage = 'curriculum'")
    built = {run.data.tags["stage"]: run for run in first.runs("tags.state = 'built'")}
    assert set(STAGES) <= set(built)
    assert {run.info.status for run in [*parents, *built.values()]} == {"FINISHED"}
    oldest = min(parents, key=lambda run: run.info.start_time)
    for name in STAGES:
        tags = built[name].data.tags
        assert tags["fingerprint"] and tags["prefect.flow_run_id"] and tags["git"] and tags["experiment"] == "mini"
        assert (tags["attempt"], tags["host"]) == ("1", socket.gethostname()) and tags["dirty"] in ("true", "false")
        assert tags["device"] == "cpu"
    assert built["sample"].data.tags["mlflow.parentRunId"] == oldest.info.run_id
    assert oldest.data.metrics["base/acc.world"] == first.result["scores"]["base"]["tasks"]["world"]["acc"]
    page = first.store / "reports" / f"{first.result['stages']['export']['fingerprint']}.html"
    assert "<svg" in page.read_text() and "mini: chat model" in page.read_text()
    assert "report.html" in [item.path for item in first.client.list_artifacts(oldest.info.run_id)]
    for name in TRAININGS:
        assert "samples.jsonl" in [item.path for item in first.client.list_artifacts(built[name].info.run_id)]
    assert built["pretrain"].data.params["optimizer.learning_rate"] == str(mini().pretrain.optimizer.learning_rate)


def test_the_report_shows_samples_over_time_and_how_instructions_are_followed(first: SimpleNamespace) -> None:
    page = (first.store / "reports" / f"{first.result['stages']['export']['fingerprint']}.html").read_text()
    for name, asked in (("pretrain", mini().pretrain.samples), ("finetune", mini().finetune.samples)):
        folder = Path(first.result["stages"][name]["uri"])
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        last = json.loads((folder / "manifest.json").read_text())["summary"]["steps"]
        assert asked is not None and [line["step"] for line in lines] == [
            *range(0, last, asked.interval),
            last,
        ]
        for line in lines:
            assert [said["prompt"] for said in line["samples"]] == asked.prompts
    kept = [json.loads(line)["samples"] for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert kept[0] != kept[-1]  # it says something else by then
    boxes = re.findall(r'<p class="asked">([^<]*)</p>\n<div class="times">(.*?)</div>\n</div>', page, re.DOTALL)
    prompts = [*mini().pretrain.samples.prompts, *mini().finetune.samples.prompts]  # type: ignore[union-attr]
    assert [html.unescape(prompt) for prompt, _ in boxes] == prompts
    shown = [re.findall(r"step ([\d,]+)</p>", box) for _, box in boxes]
    assert shown[0] == ["0", str(STEPS)] and shown[-1][0] == "0" and shown[-1][-1] == str(last)

    scores, margins = first.result["scores"], first.result["scores"]["followed"]
    assert "Instructions: chat model against base model" in page
    for name, margin in margins.items():
        base, chat = (scores[kind]["instructions"][name] for kind in ("base", "chat"))
        assert base["items"] == chat["items"] > 5
        assert margin["difference"] == pytest.approx(chat["share"] - base["share"])
        assert margin["low"] <= margin["difference"] <= margin["high"]
    card = (Path(first.result["models"]["chat"]) / "README.md").read_text()
    assert f"| both | {scores['chat']['instructions']['followed']['share']:.3f} | " in card
    assert set(margins) == set(PARTS) and scores["chat"]["instructions"]["prompts"] == 16


def test_mlflow_has_each_step_once(first: SimpleNamespace) -> None:
    (run,) = first.runs("tags.stage = 'pretrain' and tags.state = 'built'")
    artifact = Path(first.result["stages"]["pretrain"]["uri"])
    lines = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "learning_rate", "grad_norm", "tokens_per_second"):
        history = sorted(first.client.get_metric_history(run.info.run_id, f"train/{key}"), key=lambda m: m.step)
        assert [(m.step, m.value) for m in history] == [(line["step"], line[key]) for line in lines if key in line]
    history = first.client.get_metric_history(run.info.run_id, "validation/bits_per_byte.stories")
    assert sorted(m.step for m in history) == [5, 10, 15, STEPS]


def test_mlflow_links_data_and_models(first: SimpleNamespace) -> None:
    runs = {run.data.tags["stage"]: first.client.get_run(run.info.run_id) for run in first.runs("tags.state = 'built'")}
    inputs = {name: {item.dataset.name for item in run.inputs.dataset_inputs} for name, run in runs.items()}
    assert inputs["sample"] == {"stories", "lessons"}
    assert inputs["shards"] == {"mini sample"}
    assert inputs["pretrain"] == {"mini shards"}
    assert "mini chat_shards" in inputs["finetune"]
    (shards,) = (item.dataset for item in runs["pretrain"].inputs.dataset_inputs)
    assert first.result["stages"]["shards"]["fingerprint"].startswith(shards.digest)
    assert "tokens" in shards.profile and "input_ids" in shards.schema
    assert len(json.loads(shards.source)["sha256"]) == 64
    for stage, name in (("pretrain", "vectorclm-base"), ("finetune", "vectorclm-chat")):
        made = first.result["stages"][stage]
        query = f"name = '{name}' and tags.fingerprint = '{made['fingerprint']}'"
        (version,) = first.client.search_model_versions(query)
        assert version.tags["uri"] == made["uri"]
        assert all(
            f"[{part}](#/experiments/" in version.description for part in ("sample", "tokenizer", BY_NAME[stage].result)
        )
        assert first.client.get_model_version_by_alias(name, "candidate").name == name
    (model,) = first.client.search_logged_models(
        [runs["pretrain"].info.experiment_id],
        f"tags.fingerprint = '{first.result['stages']['pretrain']['fingerprint']}'",
    )
    metrics = {metric.key: metric.value for metric in model.metrics}
    assert metrics["tasks.world.acc"] == first.result["scores"]["base"]["tasks"]["world"]["acc"]


def test_a_second_run_reuses_every_stage_and_registers_nothing(first: SimpleNamespace) -> None:
    before = len(first.client.search_model_versions())
    done = first.run()
    assert states(done) == dict.fromkeys(STAGES, "reused")
    assert json.loads(done.stdout)["scores"] == first.result["scores"]
    assert len(first.client.search_model_versions()) == before
    newest = max(first.runs("tags.stage = 'curriculum'"), key=lambda run: run.info.start_time)
    nested = first.runs(f"tags.mlflow.parentRunId = '{newest.info.run_id}'")
    assert {run.data.tags["stage"]: run.data.tags["state"] for run in nested} == dict.fromkeys(STAGES, "reused")


def kill_training(store: Path, stage: str, ended: Event) -> bool:
    """Kill the process that makes a stage for this store with -9, as soon as there is one; False where none came."""
    while not ended.is_set():
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if stage in line and "--relay" in line and str(store) in line and "setpriv" not in line[0]:
                process.kill()
                return True
        time.sleep(0.01)
    return False


def test_a_changed_setting_reruns_its_stage_and_what_follows(first: SimpleNamespace) -> None:
    """Its process is killed once, and the stage is retried by itself."""
    ended = Event()
    with ThreadPoolExecutor(1) as other:
        killed = other.submit(kill_training, first.store, "finetune", ended)
        done = first.run("--set", "finetune.epochs=0.5")
        ended.set()
        assert killed.result()
    rerun = following("finetune")
    assert states(done) == {name: "built" if name in rerun else "reused" for name in STAGES}
    assert done.stderr.count("its process was ended by SIGKILL") == 1
    newest = max(first.runs("tags.stage = 'curriculum'"), key=lambda run: run.info.start_time)
    tuning = first.runs(f"tags.mlflow.parentRunId = '{newest.info.run_id}' and tags.stage = 'finetune'")
    assert sorted(run.info.status for run in tuning) == ["FAILED", "FINISHED"]
    versions = first.client.search_model_versions("name = 'vectorclm-chat'")
    assert {version.tags["fingerprint"] for version in versions} == {
        first.result["stages"]["finetune"]["fingerprint"],
        json.loads(done.stdout)["stages"]["finetune"]["fingerprint"],
    }
    assert len(first.client.search_model_versions("name = 'vectorclm-base'")) == 1


def test_an_unreachable_mlflow_is_warned_of_once_and_stops_nothing(first: SimpleNamespace) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    done = first.run(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{closed}")
    assert set(states(done).values()) == {"reused"}
    assert done.stderr.count("the run goes on without it") == 1
    assert "Traceback" not in done.stderr


def test_a_failing_stage_is_named_and_what_was_finished_is_kept(first: SimpleNamespace) -> None:
    size = 60_000  # more than the text can yield
    done = first.run("--set", f"tokenizer.vocab_size={size}", "--set", f"model.vocab_size={size}")
    assert done.returncode == 2 and done.stdout == ""
    assert "error: stage tokenizer failed: " in done.stderr and "Traceback" not in done.stderr
    assert "Finished stages are kept and will be reused; fix it and run the same command again." in done.stderr
    assert "sample reused" in done.stderr
    newest = max(first.runs("tags.stage = 'curriculum'"), key=lambda run: run.info.start_time)
    nested = first.runs(f"tags.mlflow.parentRunId = '{newest.info.run_id}' and tags.stage = 'tokenizer'")
    assert [run.info.status for run in nested] == ["FAILED"]  # a setting is not mended by a retry


def test_what_is_damaged_is_made_again_with_one_warning_each(first: SimpleNamespace) -> None:
    place = {name: Path(stage["uri"]) for name, stage in first.result["stages"].items()}
    damaged = {
        "sample": next(place["sample"].rglob("*.parquet")),
        "tokenizer": place["tokenizer"] / "tokenizer.json",
        "pretrain": place["pretrain"] / "model.safetensors",
        "export": place["export"] / "chat" / "README.md",
    }
    before = {name: file.read_bytes() for name, file in damaged.items()}
    damaged["export"].unlink()
    for name in ("sample", "tokenizer", "pretrain"):
        os.truncate(damaged[name], 100 if name == "pretrain" else 0)
    done = first.run()
    assert states(done) == {name: "built" if name in damaged else "reused" for name in STAGES}
    assert {name: file.read_bytes() for name, file in damaged.items()} == before
    for name, file in damaged.items():
        (line,) = [line for line in done.stderr.splitlines() if f"{name} is built again now" in line]
        assert file.name in line


@pytest.mark.parametrize("assignment", ["finetune.epochs", "pretrain.phases.7.tokens=1", "seed.x=1"])
def test_an_assignment_that_fits_nowhere_is_refused(assignment: str) -> None:
    with pytest.raises(ConfigError, match=assignment.partition("=")[0]):
        override(mini(), [assignment])
