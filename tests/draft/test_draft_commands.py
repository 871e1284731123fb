"""`vectorclm init`: one's own text becomes an experiment that fits, and the experiment becomes a model."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flows.cli import main
from vectorclm.config import ExperimentConfig, changed, experiment_here, load_experiment
from vectorclm.corpus import file_formats
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.corpus.synthetic_world import rows as rows_of
from vectorclm.draft.speed import training_speed
from vectorclm.draft.survey import _source_of, relative
from vectorclm.errors import ConfigError
from vectorclm.lineage.chain import lineage
from vectorclm.lineage.pinning import pin
from vectorclm.model_config import ModelConfig
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store

WORLD = WorldConfig(seed=4, documents=1500, conversations=150)
BASE = ["sample", "tokenizer", "shards", "pretrain", "evaluate_base", "export"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: stories as text and conversations, and a machine of a known speed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vectorclm.draft.speed.training_speed", lambda model, *_: 2e9 / model.parameters)
    stories = [row["text"] for row in rows_of(WORLD, "stories")]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"id": 1, "body": text}) + "\n" for text in stories))
    for number in range(60):
        path = tmp_path / "texts" / ("deep" if number % 2 else "") / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(stories[number * 25 : number * 25 + 25]))
    chats = (json.dumps({"messages": row["messages"]}) for row in rows_of(WORLD, "chat-messages"))
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress("\n".join(chats).encode()))
    return tmp_path


def drafted(*arguments: str) -> tuple[ExperimentConfig, Path]:
    """The experiment that `vectorclm init` writes into the working directory."""
    assert main(["init", *arguments]) == 0
    found = experiment_here()
    assert found is not None
    return load_experiment(found)


def built(experiment: ExperimentConfig, path: Path, folder: Path) -> Store:
    """A store with all stages of the experiment, trained for a few steps."""
    length, store = experiment.shards.sequence_length, Store(str(folder / "store"))
    short = {"pretrain.phases.0.tokens": 6 * experiment.pretrain.batch_size * length, "evaluate.max_new_tokens": 4}
    short |= {"pretrain.validation_windows": 2, "evaluate.chat_prompts": 2}
    short |= {"finetune.epochs": 0.3, "finetune.validation_windows": 2} if experiment.chat is not None else {}
    pinned, _ = pin(changed(experiment, short), path, None, resolve=True)
    for stage in plans(pinned):
        run_stage(stage, pinned, store, Runtime(threads=1), None)
    return store


def test_text_alone_becomes_a_base_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment, path = drafted("--text", "stories.jsonl", "--minutes", "3")
    said = capsys.readouterr().out
    assert path == Path("stories.toml") and experiment.name == "stories" and list(plans(experiment)) == BASE
    assert "1,500 documents" in said or "documents, Latin script" in said
    assert "the largest that text and minutes can train" in said and "vectorclm run" in said
    source = experiment.sample.sources[0]
    assert (source.path, source.data_files, source.text_column) == ("json", f"{here}/stories.jsonl", "body")
    assert 'data_files = "./stories.jsonl"' in path.read_text()
    store = built(experiment, path, here)
    summary = next(iter(store.finished("sample"))).summary["sources"]["stories"]
    assert summary["validation_documents"] >= 1 and summary["exhausted"]
    (export,) = store.finished("export")
    assert export.summary == {"base": "base"} and (export.local() / "base" / "README.md").is_file()
    assert {node.stage for node in lineage(export.uri, store).nodes.values()} == set(BASE) - {"evaluate_base", "export"}
    assert main(["chat", "--store", store.uri]) == 2  # no chat model: it says so
    assert "base model" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["report", "stories", "--store", store.uri]) == 0
    assert (here / "report.html").stat().st_size > 10_000


def test_text_and_conversations_become_a_chat_model(here: Path) -> None:
    experiment, path = drafted("tales", "--text", "texts", "--chat", "chats.jsonl.gz", "--minutes", "3")
    assert experiment.name == "tales" and experiment.chat is not None and experiment.finetune is not None
    assert experiment.sample.sources[0].text_column == "text"  # 60 files: each is a document
    assert experiment.chat.sources[0].column == "messages"
    store = built(experiment, path, here)
    assert next(iter(store.finished("export"))).summary == {"base": "base", "chat": "chat"}


def test_vocabulary_shape_and_budget_follow_text_and_minutes(here: Path) -> None:
    short, path = drafted("--text", "stories.jsonl", "--minutes", "1")
    path.unlink()
    longer, _ = drafted("--text", "stories.jsonl", "--minutes", "60")
    assert longer.pretrain.tokens > short.pretrain.tokens
    assert longer.model.parameters >= short.model.parameters
    passes = longer.pretrain.tokens * 2 / longer.sample.bytes
    assert passes < 16  # the text is not learned by heart, however many the minutes


def test_few_files_are_read_by_their_parts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = (here / "texts/0.txt").read_text().split("\n\n")
    (here / "book.md").write_text("\n\n".join(f"{number} {part}" for number in range(400) for part in parts))
    experiment, path = drafted("--text", "book.md")
    assert experiment.sample.sources[0].text_column == "part"
    assert "# a document is a blank-line-separated part" in path.read_text()
    assert "blank-line-separated parts" in capsys.readouterr().out


def test_what_cannot_work_is_one_sentence(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "little.txt").write_text("A word.\n\n" * 2000)
    (here / "one.jsonl").write_text(json.dumps({"text": "".join(f"word {number} " for number in range(40_000))}))
    (here / "empty").mkdir()
    (here / "stories.toml").write_text("")
    (here / "three.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    for arguments, message in (
        (["--text", "little.txt"], "the text has 0 kB in 1 distinct documents: a model needs 200 kB at least"),
        (["--text", "one.jsonl"], "has 1 documents, and training and validation need different ones"),
        (["--text", "gone.txt"], f"there is nothing at {here}/gone.txt"),
        (["--text", "*.nothing"], "matches no files"),
        (["--text", "empty"], "no Parquet, JSON or text files"),
        (["--text", "stories.jsonl"], "stories.toml exists: remove it, or give another name"),
        (["tiny", "--text", "stories.jsonl"], "'tiny' cannot be the name"),
        (["x", "--text", "stories.jsonl", "--minutes", "0.1"], "a training needs 1 minute at least"),
        (["x", "--text", "stories.jsonl", "--chat", "three.jsonl"], "three.jsonl has no conversations"),
    ):
        assert main(["init", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("error:") == 1, said
    assert sorted(path.name for path in here.glob("*.toml")) == ["stories.toml"]


def test_the_experiment_of_this_folder_is_found(here: Path) -> None:
    assert experiment_here() is None
    (here / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    _, path = drafted("mine", "--text", "stories.jsonl")
    assert load_experiment("mine")[0].name == "mine"
    path.with_name("other.toml").write_text(path.read_text())
    with pytest.raises(ConfigError, match=r"several experiments: name one of mine\.toml, other\.toml"):
        experiment_here()


def test_the_speed_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (
        ModelConfig(
            vocab_size=320, hidden_size=size, intermediate_size=2 * size, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=size // 2, max_position_embeddings=64,
        )
        for size in (16, 512)
    )  # fmt: skip
    monkeypatch.setattr("vectorclm.draft.speed.MEASURE_SECONDS", 0.1)
    speed: Callable[[ModelConfig], float] = lambda model: training_speed(model, 64, 8, Runtime(threads=1))  # noqa: E731
    assert speed(small) > 2 * speed(large) > 0


def test_the_format_of_an_address_is_that_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = replace(file_formats.JSON, name="made", suffixes=(".made",))
    monkeypatch.setattr(file_formats, "FORMATS", (*file_formats.FORMATS, made))
    for known in file_formats.FORMATS:
        for suffix in known.suffixes:
            place = f"https://host/data/*{suffix}"
            assert _source_of(place, tmp_path) == {"path": known.name, "data_files": place}


@pytest.mark.parametrize(
    ("place", "written"),
    [
        ("/a/b/c/x.jsonl", "./x.jsonl"),
        ("/a/b/c/../x.jsonl", "../x.jsonl"),
        ("/a/b/c/../../texts/x.jsonl", "/a/texts/x.jsonl"),
        ("/other/*.txt", "/other/*.txt"),
        ("s3://bucket/x.jsonl", "s3://bucket/x.jsonl"),
        ("owner/set", "owner/set"),
    ],
)
def test_a_place_is_written_as_a_person_would_write_it(place: str, written: str) -> None:
    assert relative(place, Path("/a/b/c")) == written
