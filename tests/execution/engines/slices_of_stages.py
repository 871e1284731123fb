"""Stages that are built in slices, on a little input in a folder, by whatever workers the process has."""

from pathlib import Path
from typing import Any

from tests.conftest import write_random_model, write_sample_text
from tests.corpus.source_files import documents, source, write_parquet
from tests.test_model import CONFIG
from vectorclm.corpus.decontamination import Benchmarks
from vectorclm.corpus.sampler import write_sample
from vectorclm.corpus.source_reader import SourceRoots
from vectorclm.corpus.sources import CorpusConfig
from vectorclm.evaluation.config import Questions
from vectorclm.evaluation.run import SampleDocuments, ScoringData, score_model
from vectorclm.evaluation.tasks import TaskSetup
from vectorclm.inference.load import load_model
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.chat_writer import write_chat_shards
from vectorclm.shards.config import ChatConfig, ChatSource
from vectorclm.tokenizer import load_tokenizer

MARKS = {"quiz": ["the otters of the long river moved to the quiet lake behind the old mill"]}


def prepare(folder: Path, texts: list[str]) -> None:
    """Write the inputs of all stages."""
    write_random_model(folder, texts, CONFIG, 20_000, chat=False)
    write_sample_text(folder / "documents" / "a", texts * 2, "validation")
    for number in range(12):
        write_parquet(folder / "mirror" / "books" / f"{number}.parquet", documents(4000, f"book {number % 7}"))


def sample(folder: Path, out: Path) -> dict[str, Any]:
    """Draw documents from twelve files."""
    asked = {"sources": [source()], "bytes": 150_000, "validation_share": 0.2}
    config = CorpusConfig.model_validate(asked)
    return write_sample(config, 1, out, SourceRoots(folder / "mirror"), benchmarks=Benchmarks(MARKS))


def chat_shards(folder: Path, out: Path) -> dict[str, Any]:
    """Render and pack conversations."""
    rows = [
        [{"role": role, "content": f"{role} {number} <|im_end|>"} for role in ("user", "assistant")]
        for number in range(256 * 12)
    ]
    config = ChatConfig(
        sources=[ChatSource(label="chat", path="json", conversations=len(rows))],
        sequence_length=64,
        validation_share=0.1,
    )
    return write_chat_shards(config, {"chat": rows}, load_tokenizer(folder / "model"), 1, out, Benchmarks(MARKS))


def evaluate(folder: Path, out: Path) -> dict[str, Any]:
    """Score documents, instructions and answers."""
    runtime = Runtime(device="cpu", threads=1, data_workers=1)
    loaded = load_model(folder / "model", runtime.configure_torch(), chat=False)
    questions = Questions(instructions=12, max_new_tokens=8, prompts=["a", "b"])
    text = SampleDocuments(folder / "documents", ["a"], 12)  # type: ignore[arg-type]
    out.mkdir()
    return score_model(loaded, questions, ScoringData(TaskSetup(1), text, None), runtime, out, "evaluate")


BUILDERS = {"sample": sample, "chat_shards": chat_shards, "evaluate": evaluate}
SLICES_OF = {"sample": 12, "chat_shards": 12, "evaluate": 26}
