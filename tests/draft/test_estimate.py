"""The estimate of a dry run counts the work that the stages then do: bytes, tokens, steps, questions, answers."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tests.test_curriculum import mini
from vectorclm.config import ExperimentConfig, changed, load_experiment
from vectorclm.corpus.sources import TextSource
from vectorclm.draft import estimate as estimates
from vectorclm.draft.estimate import Estimate, estimate
from vectorclm.draft.look import look_at_chat, look_at_text
from vectorclm.draft.speed import MachineSpeed, Training, machine_speed
from vectorclm.lineage.pinning import pin
from vectorclm.model_config import ModelConfig
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.config import ChatSource
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store

FACTOR = 1.5
SPEED = MachineSpeed(training=10_000.0, reading=30_000.0, writing=500.0, plain=1.0)


def near(guess: float, found: float) -> bool:
    return found / FACTOR <= guess <= found * FACTOR


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of a known speed."""
    monkeypatch.setattr(estimates, "machine_speed", lambda *_: SPEED)


def built(experiment: ExperimentConfig, path: Path, store: Store) -> dict[str, Any]:
    """The summaries of all stages."""
    pinned, _ = pin(experiment, path, None, resolve=True)
    return {stage: run_stage(stage, pinned, store, Runtime(threads=1), None)[0].summary for stage in plans(pinned)}


def check_work(guess: Estimate, summaries: dict[str, Any]) -> None:
    """Compare the counts of the estimate with the summaries of the artifacts."""
    sample, shards, chat = (summaries[stage] for stage in ("sample", "shards", "chat_shards"))
    held_out = sum(source["validation_bytes"] for source in sample["sources"].values())
    assert near(guess.drawn, sample["bytes"] + held_out)
    assert near(guess.work["tokenizer"]["bytes"], summaries["tokenizer"]["trained_on_bytes"])
    splits = [source[split]["tokens"] for source in shards.values() for split in ("train", "validation")]
    assert near(guess.work["shards"]["tokens"], sum(splits))
    assert near(guess.work["chat_shards"]["conversations"], sum(found["read"] for found in chat["sources"].values()))
    assert near(guess.work["chat_shards"]["tokens"], chat["train"]["tokens"] + chat["validation"]["tokens"])
    assert guess.work["pretrain"]["steps"] == summaries["pretrain"]["steps"]
    assert guess.work["pretrain"]["tokens"] == summaries["pretrain"]["tokens"]
    assert near(guess.work["finetune"]["steps"], summaries["finetune"]["steps"])
    assert near(guess.work["finetune"]["tokens"], summaries["finetune"]["tokens"])
    read = summaries["pretrain"]["epochs"]
    assert near(guess.epochs, sum(read.values()) / len(read))
    for stage in ("evaluate_base", "evaluate"):
        items = sum(task["items"] for task in summaries[stage]["tasks"].values())
        assert guess.work[stage]["items"] == items
    assert set(guess.seconds) == set(summaries)


@pytest.mark.usefixtures("steady")
def test_the_work_of_tiny_is_what_its_stages_do(tmp_path: Path) -> None:
    experiment = mini()
    guess = estimate(experiment, None, Runtime())
    check_work(guess, built(experiment, tmp_path / "mini.toml", Store(str(tmp_path / "store"))))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as a file of the format and compression that its name says."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
        return
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    path.write_bytes(pack[path.suffix](data) if path.suffix in pack else data)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"])
def test_a_look_at_the_first_rows_tells_the_size_of_a_source(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vectorclm.draft.look.TEXT_BYTES", 200_000)
    words = [f"word {number * number % 9973}" for number in range(3000)]
    texts = [" ".join(words[number : number + 40]) for number in range(2500)]
    write_rows(tmp_path / name, [{"id": number, "body": text} for number, text in enumerate(texts)])
    source = TextSource(label="a", path=str(tmp_path / name), text_column="body", weight=1.0)
    look = look_at_text(source, None, None)
    assert look.bytes == pytest.approx(sum(map(len, texts)), rel=0.2)
    assert look.document_bytes == pytest.approx(sum(map(len, texts)) / len(texts), rel=0.1)
    half = look_at_text(source.model_copy(update={"filter": "id < 0"}), None, None)
    assert half.bytes == 0
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]} for text in texts
    ]
    write_rows(tmp_path / name, chats)
    found = look_at_chat(ChatSource(label="a", path=str(tmp_path / name), conversations=9999), None, None)
    assert found.conversations == pytest.approx(2500, rel=0.2)


@pytest.mark.usefixtures("steady")
def test_every_stage_of_a_hub_experiment_has_a_time_without_a_download() -> None:
    for name in ("small", "base"):
        experiment, _ = load_experiment(name)
        guess = estimate(experiment, None, Runtime())
        assert guess.available == dict.fromkeys(guess.available)
        assert set(guess.seconds) == set(plans(experiment)) and min(guess.seconds.values()) > 0
        assert guess.seconds["pretrain"] > experiment.pretrain.tokens / SPEED.training


@pytest.mark.usefixtures("steady")
def test_more_of_a_setting_is_more_work_of_its_stage() -> None:
    experiment, _ = load_experiment("tiny")
    before = estimate(experiment, None, Runtime()).seconds
    for key, value, stage in (
        ("finetune.epochs", 3.0, "finetune"),
        ("pretrain.validation_interval", 5, "pretrain"),
        ("pretrain.samples.interval", 5, "pretrain"),
        ("evaluate.instructions", 200, "evaluate_base"),
        ("evaluate.chat_prompts", 200, "evaluate"),
        ("tokenizer.bytes", 3_000_000, "tokenizer"),
        ("finetune.replay", 0.0, None),
    ):
        after = estimate(changed(experiment, {key: value}), None, Runtime()).seconds
        assert {name for name in after if after[name] > before[name]} >= ({stage} if stage else set())
        assert (after == before) == (stage is None)


def test_a_machine_that_is_busy_is_measured_by_the_time_that_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vectorclm.draft.speed.MEASURE_SECONDS", 0.2)
    model = ModelConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    speed = machine_speed(model, Training(64, 8, 16), Runtime(threads=1))
    monkeypatch.setattr("vectorclm.draft.speed.BUSY", 0.0)  # every pass counts as one beside other programs
    busy = machine_speed(model, Training(64, 8, 16), Runtime(threads=1))
    assert busy.busy and busy.training >= speed.training * 0.5
    assert speed.reading > speed.training > 0 and speed.writing > 0 and speed.plain > 0
