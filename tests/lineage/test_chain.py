"""The lineage of a model: the same in the store and in a real MLflow server, and verified against the bytes."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webdriver import WebDriver

from flows.cli import main
from flows.tracking.recorded_lineage import registered_names
from flows.tracking.registry import Registry
from flows.tracking.tracker import Tracker
from tests.conftest import one_of, read_lines
from tests.lineage.conftest import curriculum, pinned
from tests.services.browser import browser, says
from tests.services.mlflow_server import MLflowServer
from tests.services.platform import until
from tests.test_curriculum import mini
from vectorclm.errors import ConfigError, CorruptArtifactError, DataError, DivergedError
from vectorclm.lineage.chain import changes, lineage, verify
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store

__all__ = ["browser"]  # a fixture


def test_the_store_and_mlflow_tell_the_same_chain(world: SimpleNamespace) -> None:
    registry = Registry(world.store)
    for address, stage in (("models:/vectorclm-chat@candidate", "finetune"), ("models:/vectorclm-base/1", "pretrain")):
        by_store = lineage(world.second[stage], world.store).root.names
        assert registered_names(registry, address) == by_store
        assert json.dumps(by_store).count("sha256:") >= 2 and by_store["inputs"]
    chat = lineage(world.second["finetune"], world.store)
    assert set(chat.stages) == {"sample", "tokenizer", "shards", "chat_shards", "pretrain", "finetune"}
    assert [item.stage for item in chat.scores] == ["evaluate"]


def test_a_model_is_found_by_every_address(world: SimpleNamespace, tmp_path: Path) -> None:
    whole, stage = world.first["finetune"], "finetune"
    fingerprint = Path(whole).name
    export = lineage(f"{world.first['export']}/chat", world.store)
    assert export.copy is not None and export.root.fingerprint == fingerprint
    shutil.copytree(f"{world.first['export']}/chat", tmp_path / "elsewhere")
    copied = lineage(str(tmp_path / "elsewhere"), world.store)
    assert copied.root.fingerprint == fingerprint and copied.folder == tmp_path / "elsewhere"
    assert lineage(f"{stage}/{fingerprint[:16]}", world.store).root.fingerprint == fingerprint
    with pytest.raises(DataError, match="no finished"):
        lineage(f"{stage}/{'0' * 12}", world.store)
    with pytest.raises(ConfigError, match="only"):
        lineage("models:/vectorclm-chat@candidate", world.store)


def test_a_byte_changed_in_one_shard_is_named(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Store(str(tmp_path / "store"))
    shutil.copytree(world.store.root, copy.root)
    model = world.first["finetune"].replace(world.store.root, copy.root)
    assert list(verify(lineage(model, copy))) == []
    shard = next(Path(copy.root, "shards").glob("*/stories/train-00000.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (found,) = verify(lineage(model, copy))
    assert str(shard) in found
    assert main(["lineage", model, "--store", copy.uri, "--verify"]) == 1
    assert str(shard) in capsys.readouterr().out
    manifest = shard.parents[1] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sequence_length": 64', '"sequence_length": 65'))
    with pytest.raises(CorruptArtifactError, match="its bytes are not those that were written"):
        lineage(model, copy)
    told = json.loads(manifest.read_text())
    del told["manifest_sha256"]  # by somebody who knows of it
    manifest.write_text(json.dumps(told))
    assert any("was changed" in line for line in verify(lineage(model, copy)))
    manifest.unlink()
    assert any("is gone from the store" in line for line in verify(lineage(model, copy)))


def test_what_changed_between_two_models(world: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (lineage(made["finetune"], world.store) for made in (world.first, world.second))
    found = {change.place: change for change in changes(first, second)}
    assert found["finetune.epochs"][1:] == (1.0, 0.5)
    assert {place.partition(".")[0] for place in found} <= {"finetune", "scores"}
    assert changes(first, first) == []
    assert (
        main(["lineage", world.second["finetune"], "--store", world.store.uri, "--diff", world.first["finetune"]]) == 0
    )
    assert "finetune.epochs  1.0 → 0.5" in capsys.readouterr().out


def test_the_command_prints_the_tree(world: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lineage", "models:/vectorclm-chat@candidate", "--store", world.store.uri, "--verify"]) == 0
    said = capsys.readouterr().out
    for part in (
        "chat model",
        "base model",
        "chat shards",
        "tokenizer",
        "source stories",
        "verified",
        "/#/experiments/",
    ):
        assert part in said
    assert main(["lineage", world.first["pretrain"], "--store", world.store.uri, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tree"]["inputs"][0]["stage"] == "shards" and told["tree"]["facts"]["tokens"] == 8192
    assert told["mlflow"]["versions"][told["tree"]["fingerprint"]] == ["vectorclm-base 1 @candidate @mini"]


def test_the_report_is_one_page_that_fits_and_escapes(
    world: SimpleNamespace, tmp_path: Path, browser: WebDriver
) -> None:
    """In a real browser: nothing is fetched, nothing a model says is run, and nothing is wider than the window."""
    store, out = Store(str(tmp_path / "store")), tmp_path / "report.html"
    shutil.copytree(world.store.root, store.root)
    chat, before = (made["finetune"].replace(world.store.root, store.root) for made in (world.second, world.first))
    for manifest in Path(store.root, "evaluate").glob("*/manifest.json"):
        told = json.loads(manifest.read_text())
        del told["manifest_sha256"]  # which would give the change away
        told["summary"]["samples"][0]["answer"] = "<script>document.title = 'taken'</script>" + "x" * 500
        manifest.write_text(json.dumps(told))
    assert main(["report", chat, "--store", store.uri, "--against", before, "--out", str(out)]) == 0
    page = out.read_text()
    assert not re.search(r"(src|href)=|url\((?!#)|@import|<script", page)
    for part in ("champion", "base model", "Pretraining", "No step went wrong", "device hours", "stories"):
        assert part in page
    drawn = lineage(chat, store).stages["sample"].artifact.summary["sources"]["stories"]
    for split in ("documents", "validation_documents"):
        assert f'<td class="number">{drawn[split]:,}</td>' in page
    assert re.search(r"<th>dropped</th>.*?<td>[^<]*(duplicate|none)", page, re.DOTALL)
    for width in (1280, 400):
        window(browser, width, 1500)
        browser.get(out.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert "taken" not in browser.title
        curves = browser.find_elements("css selector", "svg .curve path")
        assert len(curves) >= 10 and all(curve.size["width"] > 100 for curve in curves)


def window(browser: WebDriver, width: int, height: int) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def test_mlflow_shows_the_chain_with_links_that_work(
    world: SimpleNamespace, server: MLflowServer, browser: WebDriver
) -> None:
    client = Registry(world.store).client
    (place,) = client.search_experiments(filter_string=f"name = '{pinned().name}'")
    window(browser, 1400, 665)
    browser.get(f"{server.uri}/#/experiments/{place.experiment_id}/runs?workflowType=machine_learning")
    until(lambda: says(browser, f"{pinned().name} "), "the table of runs", 60)
    for close in browser.find_elements(By.CSS_SELECTOR, "button[aria-label='Close']"):
        browser.execute_script("arguments[0].click()", close)  # the assistant beside it
    folded = ".ag-row [col-id*='Run Name'] button"
    until(lambda: browser.find_elements(By.CSS_SELECTOR, folded), "a curriculum to unfold", 60)[0].click()
    until(lambda: says(browser, "evaluate_base"), "the runs of its stages", 60)
    window(browser, 1400, 545)
    browser.get(f"{server.uri}/#/models/vectorclm-chat/versions/1")
    until(lambda: says(browser, "chat shards"), "the chain in the version's description", 60)
    link = browser.find_element(By.LINK_TEXT, "base model").get_attribute("href")
    browser.get(link)
    until(lambda: says(browser, "train/loss"), "the run that the chain links to", 60)
    assert says(browser, "what it holds")  # its own chain
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_champion_yields_only_to_what_is_better_beyond_noise(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two models of `world` hardly learned: neither beats chance, and a first champion is set by hand."""
    arguments = ["promote", "models:/vectorclm-chat@candidate", "--store", world.store.uri]
    client = Registry(world.store).client
    assert main(arguments) == 1
    assert "acc.world is not better by more than the noise" in " ".join(capsys.readouterr().out.split())
    assert "champion" not in client.get_registered_model("vectorclm-chat").aliases
    client.set_registered_model_alias("vectorclm-chat", "champion", "1")
    assert main(arguments) == 1
    tags = client.get_model_version("vectorclm-chat", "2").tags
    assert tags["promotion.decision"] == "refused" and tags["promotion.over"] == "vectorclm-chat 1"
    assert tags["promotion.method"].startswith("paired bootstrap over items")
    (run, _) = client.search_runs([client.get_experiment_by_name("evaluations").experiment_id])
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "comparison.json")).read_text())
    assert table["columns"][0] == "score" and table["data"][0][0] == "acc.world"
    assert main(["promote", "models:/vectorclm-chat/1", "--store", world.store.uri]) == 0
    assert main([*arguments, "--task", "nothing"]) == 2


def test_a_suite_by_hand_is_told_to_mlflow_once_where_it_knows_the_model(
    world: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mini.json").write_text(mini().model_dump_json())
    options = ["--suite", str(tmp_path / "mini.json"), "--store", world.store.uri, "--documents", "2", "--items", "2"]
    assert main(["evaluate", "models:/vectorclm-base/1", *options, "--json"]) == 0
    said = capsys.readouterr()
    scores = json.loads(said.out)
    assert "recorded in MLflow: http" in said.err
    registry = Registry(world.store)
    client, query = registry.client, f"tags.fingerprint = '{Path(scores['uri']).name}'"
    (run,) = client.search_runs([client.get_experiment_by_name("evaluations").experiment_id], query)
    assert run.data.metrics["acc.world"] == scores["scores"]["tasks"]["world"]["acc"]
    (model,) = client.get_run(run.info.run_id).inputs.model_inputs
    assert client.get_model_version("vectorclm-base", "1").source == f"models:/{model.model_id}"
    subject = registry.find("models:/vectorclm-base/1")
    assert registry.history(subject, world.store.find("measure", Path(scores["uri"]).name).manifest["config"]) == []
    code = {"label": "code", "task": "humaneval", "path": "o/code", "mirror": "code.jsonl", "runs_code": True}
    (tmp_path / "code.jsonl").write_text("{}\n")
    (tmp_path / "code.json").write_text(json.dumps({"name": "code", "tasks": [code]}))
    asked = ["--suite", str(tmp_path / "code.json"), "--data", str(tmp_path), "--store", world.store.uri]
    assert main(["evaluate", "models:/vectorclm-base/1", *asked]) == 0
    assert "acc.code                 not run" in capsys.readouterr().out
    (run,) = client.search_runs(
        [client.get_experiment_by_name("evaluations").experiment_id], "tags.not_run = 'code' and tags.suite = 'code'"
    )
    assert not any("code" in name for name in run.data.metrics)
    assert main(["evaluate", world.first["pretrain"] + "/", *options]) == 0  # told already
    shutil.copytree(world.first["pretrain"], tmp_path / "copy")
    assert main(["evaluate", str(tmp_path / "copy"), *options]) == 0  # no model of MLflow's
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["evaluate", world.first["pretrain"], *options]) == 0
    assert "MLflow" not in capsys.readouterr().err and not Path(world.store.root, "mlflow.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["evaluate", world.first["pretrain"], *options]) == 0
    assert (
        "warning: MLflow at http://127.0.0.1:9 does not answer; the result is in the store" in capsys.readouterr().err
    )


def test_the_better_model_becomes_the_champion(world: SimpleNamespace) -> None:
    """The one that was trained, over one that hardly was; and then that one does not."""
    hardly = curriculum(pinned("pretrain.phases=[{tokens = 512}]", "finetune.epochs=0.06"), world.store)
    client, fingerprint = Registry(world.store).client, Path(hardly["finetune"]).name
    (other,) = client.search_model_versions(f"name = 'vectorclm-chat' and tags.fingerprint = '{fingerprint}'")
    client.set_registered_model_alias("vectorclm-chat", "champion", other.version)
    options = ["--store", world.store.uri, "--task", "bits_per_byte.stories"]
    for candidate, code in (("1", 0), (str(other.version), 1)):
        assert main(["promote", f"models:/vectorclm-chat/{candidate}", *options]) == code
        assert str(client.get_model_version_by_alias("vectorclm-chat", "champion").version) == "1"
        decision = client.get_model_version("vectorclm-chat", candidate).tags["promotion.decision"]
        assert decision == ("refused" if code else "promoted")


def line(step: int) -> str:
    values = {"step": step, "tokens": 10 * step, "loss": 4.0 - step / 100, "learning_rate": 0.1}
    return json.dumps({**values, "grad_norm": 1.0, "tokens_per_second": 5.0}) + "\n"


REPAIRS = {"stop": "start", "suspend": "resume", "fill": "free"}


@pytest.mark.parametrize("fault", one_of(list(REPAIRS)))
def test_a_server_that_is_away_slow_or_full_for_half_of_a_run_misses_nothing(
    server: MLflowServer,
    world: SimpleNamespace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
) -> None:
    """The server breaks during a training. It recovers after another stage has begun and the training has gone on."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
    experiment, stages = pinned().model_copy(update={"name": fault}), plans(pinned())
    base = world.store.find("pretrain", stages["pretrain"].fingerprint)
    with Tracker(world.store, experiment, stages) as tracker, tracker.stage("pretrain", 1, tmp_path) as run:
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text("".join(line(step) for step in range(1, 6)))
        until(lambda: len(run._sent) == 5, "what the training did so far is told", 60)
        getattr(server, fault)()
        with metrics.open("a") as file:
            file.write("".join(line(step) for step in range(6, 11)))
        with tracker.stage("sample", 1, tmp_path / "sample") as other:
            other.finished(world.store.find("sample", stages["sample"].fingerprint))
        until(lambda: "goes on without it" in caplog.text, "it is noticed", 60)
        until(lambda: len(run._load.waiting) >= 20, "the machine's load is still looked at", 60)
        getattr(server, REPAIRS[fault])()
        until(lambda: len(run._sent) == 10, "the rest is told, too", 60)
        run.finished(base)
    client = Registry(world.store).client
    runs = client.search_runs([tracker.experiment_id])
    assert sorted(found.info.run_id for found in runs) == sorted(tracker.run_ids.values())  # none was made twice
    assert {found.info.status for found in runs} == {"FINISHED"}
    assert client.get_run(tracker.run_ids["sample"]).inputs.dataset_inputs
    told = client.get_metric_history(tracker.run_ids["pretrain"], "train/loss")
    assert sorted(metric.step for metric in told)[:10] == list(range(1, 11))
    assert len({metric.step for metric in told}) == len(told)  # none twice
    load = client.get_metric_history(tracker.run_ids["pretrain"], "system/cpu_utilization_percentage")
    assert sorted(metric.step for metric in load) == list(range(len(load))) and len(load) > 3  # none is missing
    assert caplog.text.count("goes on without it") == 1


def test_what_a_server_missed_to_the_end_is_told_by_the_next_run(
    server: MLflowServer, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an attempt that another machine left RUNNING is closed by the one that completes its stage."""
    experiment, stages = pinned().model_copy(update={"name": "late"}), plans(pinned())
    base = world.store.find("pretrain", stages["pretrain"].fingerprint)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        with Tracker(world.store, experiment, stages) as tracker:
            tracker.reused("pretrain", base)
    client = Registry(world.store).client
    place = client.create_experiment("late")
    tags = {"host": "another", "stage": "pretrain", "fingerprint": base.fingerprint}
    lost = client.create_run(place, tags=tags).info.run_id
    for state in ("built", "reused"):
        with Tracker(world.store, experiment, stages) as tracker:
            tracker.reused("pretrain", base)
        run = client.get_run(tracker.run_ids["pretrain"])
        assert run.data.tags["state"] == state
        if state == "built":
            assert len(client.get_metric_history(run.info.run_id, "train/loss")) == base.summary["steps"]
            assert run.inputs.dataset_inputs and run.data.params["optimizer.learning_rate"]
    assert client.get_run(lost).info.status == "KILLED"


def test_a_training_that_leaves_the_finite_numbers_is_told_with_its_windows_and_keeps_a_good_checkpoint(
    server: MLflowServer, world: SimpleNamespace
) -> None:
    """Its weights grow tenfold a step, by a weight decay that is none."""
    changes = ("name=burst", "pretrain.optimizer.weight_decay=30000.0", "pretrain.phases=[{tokens = 20480}]")
    experiment, store = pinned(*changes), world.store
    stages = plans(experiment)
    folder = store.work_folder(stages["pretrain"], None)
    with (
        pytest.raises(DivergedError) as raised,
        Tracker(store, experiment, stages) as tracker,
        tracker.stage("pretrain", 1, folder),
    ):
        run_stage("pretrain", experiment, store, Runtime(threads=1, checkpoint_interval=5), None)
    client = Registry(store).client
    run = client.get_run(tracker.run_ids["pretrain"])
    parent = client.get_run(tracker.run_ids["curriculum"])
    assert (run.info.status, parent.info.status) == ("FAILED", "FAILED")
    ((name, told),) = [(key, value) for key, value in run.data.tags.items() if key.startswith("event.")]
    step = int(name.removeprefix("event.step "))
    assert parent.data.tags[f"event.pretrain step {step}"] == told and told.startswith("not finite: loss nan")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "event/not_finite")] == [step]
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in losses) == list(range(1, step))
    (event,) = read_lines(Path(client.download_artifacts(run.info.run_id, "events.jsonl")))
    windows = event["event"]["windows"]
    assert windows in str(raised.value) and told.endswith(windows)
    shards = store.find("shards", stages["shards"].fingerprint)
    named = [part.rpartition(".arrow")[0] for part in windows.split("; ")]
    assert named and all(f"{place}.arrow" in shards.manifest["files"] for place in named)
    kept = load_file(Path(run.data.tags["last_checkpoint"]) / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
