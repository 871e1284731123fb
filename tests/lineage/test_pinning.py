"""Pinning: revisions from content, lock file and mirror; what a mirror lacks is left out and told."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpus.test_hub import minimal_experiment
from vectorclm.config import ExperimentConfig
from vectorclm.corpus.sampler import write_sample
from vectorclm.corpus.source_reader import SourceRoots
from vectorclm.corpus.sources import identity
from vectorclm.errors import ConfigError, DataError
from vectorclm.lineage.pinning import check_sources, pin

BOOKS, WEB, CHAT = "owner/books", "owner/web", "owner/chat"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def experiment(**values: Any) -> ExperimentConfig:
    """Three configs of one set, another set, and a chat set."""
    names = {"novels": 0.1, "plays": 0.2, "poems": 0.3}
    texts = [{"label": name, "path": BOOKS, "name": name, "weight": weight} for name, weight in names.items()]
    texts.append({"label": "web", "path": WEB, "weight": 0.4})
    settings = minimal_experiment(texts, [{"label": "chat", "path": CHAT, "conversations": 1}])
    settings["pretrain"]["phases"] = [
        {"tokens": 64, "weights": {"novels": 0.6, "plays": 0.2, "web": 0.2}},
        {"tokens": 64, "weights": {"novels": 0.7, "web": 0.3}},
        {"tokens": 64},
    ]
    return ExperimentConfig.model_validate({**settings, **values})


def mirror(folder: Path, *places: str) -> Path:
    """A mirror with one small file at each of the places."""
    for number, place in enumerate(places):
        (folder / place).mkdir(parents=True, exist_ok=True)
        turns = [{"role": "user", "content": "Hi"}]
        table = pa.table({"text": [f"{number}"], "messages": [turns]})
        pq.write_table(table, folder / place / "train-00000-of-00001.parquet")
    return folder


def weights(config: ExperimentConfig) -> dict[str, float]:
    return {source.label: source.weight for source in config.sample.sources}


def test_a_whole_mirror_pins_every_source_to_its_content(tmp_path: Path) -> None:
    data = mirror(tmp_path / "data", "books/novels", "books/plays", "books/poems", "web", "chat")
    before = experiment()
    pinned, notes = pin(before, tmp_path / "x.toml", data, resolve=True)
    assert notes == [] and not (tmp_path / "x.lock.json").exists()
    everything = [*pinned.sample.sources, *pinned.chat.sources]
    assert all(source.revision.startswith("sha256:") for source in everything if source.revision)
    assert len({source.revision for source in everything}) == 5
    assert weights(pinned) == weights(before) and pinned.pretrain == before.pretrain
    assert pin(pinned, tmp_path / "x.toml", data, resolve=True) == (pinned, [])

    moved = mirror(tmp_path / "elsewhere", "books/novels", "books/plays", "books/poems", "web", "chat")
    again, _ = pin(before, tmp_path / "x.toml", moved, resolve=False)
    assert [identity(s) for s in again.sample.sources] == [identity(s) for s in pinned.sample.sources]
    check_sources(pinned, data, hub=True)


def test_what_a_mirror_lacks_is_told_and_its_set_keeps_its_share(tmp_path: Path) -> None:
    data = mirror(tmp_path / "data", "books/plays", "books/poems", "web", "chat")
    pinned, notes = pin(experiment(), tmp_path / "x.toml", data, resolve=True)
    assert notes == ["owner/books: the mirror has no novels; plays, poems get its share"]
    assert weights(pinned) == pytest.approx({"plays": 0.24, "poems": 0.36, "web": 0.4})
    phases = [phase.weights for phase in pinned.pretrain.phases]
    assert phases[0] == pytest.approx({"plays": 0.8, "web": 0.2})
    assert phases[1] == pytest.approx({"plays": 0.28, "poems": 0.42, "web": 0.3})
    assert phases[2] == {}
    assert phases[0]["web"] == 0.2 and weights(pinned)["web"] == 0.4  # an untouched set keeps its very numbers


def test_what_a_mirror_lacks_is_made_up_for_by_the_rest_of_its_set_in_bytes(tmp_path: Path) -> None:
    data = mirror(tmp_path / "data", "books/plays", "books/poems", "web", "chat")
    for number, place in enumerate(("books/plays", "books/poems", "web")):
        texts = [f"{place} has a text of {number} and {row}" for row in range(400)]
        pq.write_table(pa.table({"text": texts}), data / place / "train-00000-of-00001.parquet")
    pinned, _ = pin(experiment(), tmp_path / "x.toml", data, resolve=True)
    drawn = write_sample(pinned.sample.model_copy(update={"bytes": 10_000}), 3, tmp_path / "out", SourceRoots(data))
    sizes = {label: made["bytes"] + made["validation_bytes"] for label, made in drawn["sources"].items()}
    assert sizes == pytest.approx({"plays": 2400, "poems": 3600, "web": 4000}, abs=50)


def test_a_set_wholly_missing_is_an_error(tmp_path: Path) -> None:
    data = mirror(tmp_path / "data", "books/plays", "chat")
    with pytest.raises(DataError, match=r"owner/web: the mirror .* has no files of it; expected .*data/web"):
        pin(experiment(), tmp_path / "x.toml", data, resolve=False)
    with pytest.raises(DataError, match=r"no folder .*gone: --data takes the folder"):
        pin(experiment(), tmp_path / "x.toml", tmp_path / "gone", resolve=False)


def test_benchmarks_are_left_out_one_by_one(tmp_path: Path) -> None:
    data = mirror(tmp_path / "data", "books/plays", "web", "chat", "arc")
    tasks = [{"label": name, "path": f"owner/{name}", "task": "arc_easy"} for name in ("arc", "piqa")]
    pinned, notes = pin(experiment(evaluate={"prompts": ["Hi"], "tasks": tasks}), tmp_path / "x", data, resolve=True)
    assert [task.label for task in pinned.evaluate.tasks] == ["arc"]
    assert "owner/piqa: the mirror has no piqa" in notes
    lost = experiment(evaluate={"prompts": ["Hi"], "tasks": tasks[1:]})
    with pytest.raises(DataError, match=r"the benchmarks: the mirror .* has no files of it; .*data/piqa"):
        pin(lost, tmp_path / "x", data, resolve=True)


def test_a_dry_run_takes_the_lock_and_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", None)  # any use of the network fails
    (tmp_path / "x.lock.json").write_text(json.dumps({BOOKS: COMMIT}))
    before = sorted(tmp_path.iterdir())
    pinned, notes = pin(experiment(), tmp_path / "x.toml", None, resolve=False)
    revisions = [source.revision for source in pinned.sample.sources]
    assert revisions == [COMMIT] * 3 + ["unresolved"] and pinned.chat.sources[0].revision == "unresolved"
    assert notes == [] and sorted(tmp_path.iterdir()) == before
    assert all("mirror" not in identity(source) for source in pinned.sample.sources)


def test_commits_in_the_experiment_come_before_the_lock(tmp_path: Path) -> None:
    (tmp_path / "x.lock.json").write_text(json.dumps({BOOKS: COMMIT, f"{BOOKS}@v2": COMMIT[::-1]}))
    settings = experiment().model_dump()
    for source, revision in zip(settings["sample"]["sources"], ("f" * 40, "v2", None, None), strict=True):
        source["revision"] = revision
    pinned, _ = pin(ExperimentConfig.model_validate(settings), tmp_path / "x.toml", None, resolve=False)
    assert [s.revision for s in pinned.sample.sources] == ["f" * 40, COMMIT[::-1], COMMIT, "unresolved"]


@pytest.mark.parametrize("text", ["{", '{"owner/books": "main"}', "3"])
def test_a_broken_lock_file_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.lock.json").write_text(text)
    with pytest.raises(ConfigError, match=r"x\.lock\.json.*to pin again"):
        pin(experiment(), tmp_path / "x.toml", None, resolve=False)


def test_content_that_differs_from_its_pin_is_an_error(tmp_path: Path) -> None:
    data = mirror(tmp_path / "data", "books/novels", "books/plays", "books/poems", "web", "chat")
    pinned, _ = pin(experiment(), tmp_path / "x.toml", data, resolve=True)
    pq.write_table(pa.table({"text": ["changed"]}), data / "web" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"source web .* is pinned to sha256:\w+, but the content is sha256:"):
        pin(pinned, tmp_path / "x.toml", data, resolve=True)
    with pytest.raises(DataError, match="pinned to local content: give its folder with --data DIR"):
        pin(pinned, tmp_path / "x.toml", None, resolve=True)
    assert pin(pinned, tmp_path / "x.toml", None, resolve=False) == (pinned, [])


def test_the_world_is_pinned_by_its_rows(tmp_path: Path) -> None:
    world = {"label": "stories", "path": "world", "name": "stories", "weight": 1.0}
    chat = [{"label": "chat", "path": "world", "name": "chat-messages", "conversations": 1}]
    settings = minimal_experiment([world], chat)
    revisions = []
    for seed in (1, 1, 2):
        asked = ExperimentConfig.model_validate({**settings, "world": {"seed": seed}})
        pinned, _ = pin(asked, tmp_path / "x.toml", None, resolve=False)
        revisions.append(pinned.sample.sources[0].revision)
        check_sources(pinned, None, hub=False)
    assert revisions[0] == revisions[1] != revisions[2]


def test_sources_are_checked_before_any_work(tmp_path: Path) -> None:
    data = mirror(tmp_path / "data", "books/plays", "web", "chat")
    pq.write_table(pa.table({"turns": ["x"]}), data / "chat" / "train-00000-of-00001.parquet")
    pinned, _ = pin(experiment(), tmp_path / "x.toml", data, resolve=True)
    with pytest.raises(DataError, match=r"source chat .*no column 'messages'; it has turns"):
        check_sources(pinned, data, hub=False)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "{}/nope"}, r"there is no folder .*/nope, and it is not the id of a hub repository"),
        ({"path": "./nope"}, r"there is no folder /.*/nope, and"),
        ({"path": "texts/own/nope"}, r"there is no folder /.*/texts/own/nope"),
        ({"path": "~/own"}, rf"there is no folder {Path.home()}/own"),
        ({"path": "json"}, r"source books \(json.* names no files: set data_files or data_dir$"),
        ({"path": "json", "mirror": "m"}, r"names no files: .*, or give its mirror with --data DIR"),
        ({"path": "json", "data_files": "{}/*.json"}, r"no such file: .*/\*\.json$"),
    ],
)
def test_a_local_source_that_is_not_there_is_no_hub_id(tmp_path: Path, values: dict[str, str], message: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    given = {key: value.format(tmp_path) for key, value in values.items()}
    settings = minimal_experiment(
        [{"label": "books", "weight": 1.0, **given}], [{"label": "chat", "path": CHAT, "conversations": 1}]
    )
    with pytest.raises(DataError, match=message):
        pin(ExperimentConfig.model_validate(settings), tmp_path / "x.toml", None, resolve=False)
