"""The hub path without the hub: the production code, in its own process, against a server with its routes."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.services.hub import Hub
from vectorclm.corpus.sample_reader import read_texts

COSMOPEDIA, FINEWEB = "HuggingFaceTB/cosmopedia", "HuggingFaceFW/fineweb-edu"
SMOLTALK, SLIMORCA, TULU = "HuggingFaceTB/smoltalk", "Open-Orca/SlimOrca", "allenai/tulu-3-sft-personas-code"

CHILD = """
import json, sys
from pathlib import Path
import datasets
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0  # five seconds a source, against a fault of older pyarrow
from vectorclm.config import load_experiment
from vectorclm.corpus.source_reader import SourceRoots, draw, open_source
from vectorclm.errors import VectorCLMError
from vectorclm.lineage.pinning import check_sources, pin
from vectorclm.corpus.sampler import write_sample
try:
    experiment, notes = pin(*load_experiment(sys.argv[1]), None, resolve=True)
    check_sources(experiment, None, hub=True)
    summary = write_sample(experiment.sample, experiment.seed, Path(sys.argv[2]), SourceRoots())
    chats = {s.label: next(draw(s, open_source(s, None, None, [s.column]))) for s in experiment.chat.sources}
    print(json.dumps({"notes": notes, "summary": summary, "chats": chats}))
except VectorCLMError as error:
    print(json.dumps({"error": str(error)}))
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def card(configs: dict[str, dict[str, str]]) -> bytes:
    """A README whose front matter declares configs and the files of their splits."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, files in splits.items():
            lines += [f"  - split: {split}", f"    path: {files}"]
    return "\n".join([*lines, "---", "A data set."]).encode()


def cosmopedia(version: str) -> dict[str, bytes]:
    stories = [{"prompt": "p", "text_token_length": 3, "text": f"story {version} {n}"} for n in range(60)]
    wikihow = [{"text_token_length": 3, "text": f"how to {version} {n}", "prompt": "p"} for n in range(60)]
    names = ("stories", "wikihow")
    return {
        "README.md": card({name: {"train": f"data/{name}/train-*"} for name in names}),
        "data/stories/train-00000-of-00002.parquet": parquet(stories[:30]),
        "data/stories/train-00001-of-00002.parquet": parquet(stories[30:]),
        "data/wikihow/train-00000-of-00001.parquet": parquet(wikihow),
    }


def turns(text: str) -> list[dict[str, str]]:
    return [{"content": text, "role": "user"}, {"content": "Yes.", "role": "assistant"}]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        hub.push(COSMOPEDIA, cosmopedia("one"))
        fineweb = [{"text": f"page {n}", "id": str(n), "score": 3.5} for n in range(80)]
        sample = {"sample-10BT": {"train": "sample/10BT/*"}}
        hub.push(FINEWEB, {"README.md": card(sample), "sample/10BT/000_00000.parquet": parquet(fineweb)})
        smoltalk = {"train": parquet([{"messages": turns("train"), "source": "s"}])}
        smoltalk["test"] = parquet([{"messages": turns("test"), "source": "s"}])
        files = {f"data/all/{split}-00000-of-00001.parquet": data for split, data in smoltalk.items()}
        splits = {split: f"data/all/{split}-*" for split in smoltalk}
        hub.push(SMOLTALK, {"README.md": card({"all": splits}), **files})
        orca = {"conversations": [{"from": "human", "value": "Hi", "weight": None}]}
        hub.push(SLIMORCA, {"README.md": b"No front matter.", "oo-labeled.jsonl": json.dumps(orca).encode()})
        tulu = [{"id": "1", "prompt": "p", "messages": turns("code")}]
        hub.push(TULU, {"README.md": b"", "data/train-00000-of-00001.parquet": parquet(tulu)})
        yield hub


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """An experiment over the hub's five sets."""
    texts = [(COSMOPEDIA, "stories", 0.25), (COSMOPEDIA, "wikihow", 0.25), (FINEWEB, "sample-10BT", 0.5)]
    sources = [{"label": name.lower(), "path": path, "name": name, "weight": w} for path, name, w in texts]
    chats = [
        {"label": "smoltalk", "path": SMOLTALK, "name": "all", "split": "test", "conversations": 1},
        {"label": "slimorca", "path": SLIMORCA, "column": "conversations", "conversations": 1},
        {"label": "tulu", "path": TULU, "conversations": 1},
    ]
    path = tmp_path / "five.json"
    path.write_text(json.dumps(minimal_experiment(sources, chats)))
    return path


def minimal_experiment(sources: list[dict[str, Any]], chats: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of a whole experiment whose sources alone matter."""
    loop = {
        "batch_size": 1,
        "validation_interval": 1,
        "optimizer": {"learning_rate": 0.01, "adamw_learning_rate": 0.01},
    }
    loop["schedule"] = {"kind": "cosine", "warmup": 0.1, "floor": 0.1}
    model = {
        "vocab_size": 300,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "head_dim": 4,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return {
        "name": "five",
        "seed": 3,
        "sample": {"sources": sources, "bytes": 2000, "validation_share": 0.2},
        "tokenizer": {"vocab_size": 300, "bytes": 1000},
        "shards": {"sequence_length": 16},
        "model": {**model, **heads},
        "pretrain": {**loop, "phases": [{"tokens": 64}]},
        "chat": {"sources": chats, "sequence_length": 32},
        "finetune": {**loop, "epochs": 1},
        "evaluate": {"prompts": ["Hi"]},
    }


def run(endpoint: str, experiment: Path, out: Path) -> dict[str, Any]:
    """Pin and sample in a fresh process, because the endpoint is read when the libraries are imported."""
    home = str(experiment.parent / "home")
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": home, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", CHILD, str(experiment), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_hub_is_pinned_sampled_and_pinned_again(hub: Hub, experiment: Path, tmp_path: Path) -> None:
    first = run(hub.url, experiment, tmp_path / "first")
    assert first["notes"] == []
    lock = experiment.with_name("five.lock.json")
    assert json.loads(lock.read_text()) == hub.heads
    assert not any("main" in request for request in hub.requests)

    sources = first["summary"]["sources"]
    assert list(sources) == ["stories", "wikihow", "sample-10bt"]
    texts = {label: set(read_texts(tmp_path / "first" / label, "train")) for label in sources}
    assert texts["stories"] <= {f"story one {n}" for n in range(60)}
    assert texts["wikihow"] <= {f"how to one {n}" for n in range(60)}
    assert sources["sample-10bt"]["exhausted"] and not sources["stories"]["exhausted"]
    assert len(texts["sample-10bt"]) + sources["sample-10bt"]["validation_documents"] == 80
    assert first["chats"]["smoltalk"] == {"messages": turns("test")}
    assert first["chats"]["slimorca"] == {"conversations": [{"from": "human", "value": "Hi", "weight": None}]}
    assert first["chats"]["tulu"] == {"messages": turns("code")}

    drawn = {label: drawn["documents"] + drawn["validation_documents"] for label, drawn in sources.items()}
    assert all(drawn[label] <= made["read"] and made["dropped"] == {} for label, made in sources.items())
    halves = {int(text.split()[-1]) < 30 for text in texts["stories"]}
    assert halves == {True, False}  # documents of both files, as they are read by turns

    old = hub.heads[COSMOPEDIA]
    new = hub.push(COSMOPEDIA, cosmopedia("two"))
    hub.requests.clear()
    second = run(hub.url, experiment, tmp_path / "second")
    assert second == first
    assert any(old in request for request in hub.requests)
    assert not any(new in request for request in hub.requests)
    assert list(read_texts(tmp_path / "second" / "stories", "train")) == list(
        read_texts(tmp_path / "first" / "stories", "train")
    )

    hub.remove(COSMOPEDIA, old)
    error = run(hub.url, experiment, tmp_path / "third")["error"]
    assert f"no revision {old}" in error and ".lock.json" in error and COSMOPEDIA in error


def test_a_hub_out_of_reach_is_told_with_a_way_out(experiment: Path, tmp_path: Path) -> None:
    with Hub() as closed:
        endpoint = closed.url
    error = run(endpoint, experiment, tmp_path / "out")["error"]
    assert "source stories" in error and "--data DIR" in error and "network" in error
    assert not experiment.with_name("five.lock.json").exists()
