"""Score a model: benchmarks, bits per byte of held-out text, answers in the chat template, instructions followed."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from vectorclm.corpus.decontamination import contaminated
from vectorclm.corpus.sample_reader import SampleFiles
from vectorclm.corpus.sources import TaskSource
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.evaluation.bits_per_byte import text_scores
from vectorclm.evaluation.instruction_prompts import instructions
from vectorclm.evaluation.instructions import instruction_scores
from vectorclm.evaluation.item_scores import ItemScores, write_scores
from vectorclm.evaluation.tasks import score_tasks
from vectorclm.inference.generate import SamplingParams, answer_text, continuation, template_scores
from vectorclm.inference.load import open_model
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.progress import Progress
from vectorclm.shards.chat_writer import read_prompts
from vectorclm.store.artifact import Artifact
from vectorclm.store.layout import MEASURE
from vectorclm.store.model_ref import Model


class ScoringData(NamedTuple):
    """What a model is scored on beside its tasks; what is None is not scored."""

    sample: Artifact | None  # with held-out documents
    labels: Sequence[str]  # of the sample's sources that are scored
    conversations: Artifact | None  # with held-out prompts
    world: WorldConfig | None  # that tasks may read
    mirror: Path | None  # a local folder that tasks may be read from
    training_text: Callable[[Tokenizer], Iterator[bytes]] | None  # of the model, in which items are looked for


def score_model(
    model: Model,
    tasks: Sequence[TaskSource],
    config: Mapping[str, Any],
    data: ScoringData,
    runtime: Runtime,
    out: Path,
) -> dict[str, Any]:
    """Score a model on tasks, held-out text, conversations and instructions, and write its scores into `out`.

    `config` is the measurement's, with the number of each that are read.
    """
    found, device = ItemScores(), runtime.configure_torch()
    folder, seed = model.local(), config["seed"]
    loaded, tokenizer = open_model(folder, model.address)
    loaded = loaded.to(device)
    labels = data.labels if data.sample is not None else ()
    scores: dict[str, Any] = {"text": {}, "tasks": {}}
    with Progress(MEASURE, len(labels) + len(tasks) + 1, "parts") as progress:
        for label in labels:
            assert data.sample is not None
            texts = _documents(data.sample, label, config["documents"], seed)
            scores["text"][label] = documents_scores(loaded, tokenizer, label, texts, device, found)
            progress.advance(1, label)
        where, template = (seed, runtime, data.mirror, data.world), "template" in config
        for kind, label, scored in score_tasks(tasks, folder, loaded, tokenizer, *where, found, template=template):
            scores[kind][label] = scored
            progress.advance(1, label)
        if data.training_text is not None:
            repeated = contaminated(found.contents, data.training_text(tokenizer))
            for label, marks in found.mark(repeated.tolist()).items():
                scores["tasks"][label] |= marks
        how = config["max_new_tokens"], SamplingParams(repetition_penalty=config.get("repetition_penalty", 1))
        if data.conversations is not None:
            prompts = read_prompts(data.conversations, config["chat_prompts"], seed)
            scores["chat"] = template_scores(loaded, tokenizer, prompts, *how)
        if count := config.get("instructions", 0):
            scores["instructions"] = instruction_scores(
                loaded, tokenizer, instructions(count), *how, chat=model.chat, out=out, found=found
            )
        respond = answer_text if model.chat else continuation
        scores["samples"] = [
            {"prompt": prompt, "answer": respond(loaded, tokenizer, prompt, *how)} for prompt in config["prompts"]
        ]
        progress.advance(1, "answers")
    write_scores(out, scores, found)
    return scores


def _documents(sample: Artifact, label: str, limit: int, seed: int) -> list[str]:
    """A seeded draw of a source's held-out documents, in their order."""
    texts = list(SampleFiles(sample).texts(label, "validation"))
    chosen = random.Random(f"{seed} {label}").sample(range(len(texts)), min(limit, len(texts)))
    return [texts[i] for i in sorted(chosen)]


def documents_scores(
    model: CausalLM, tokenizer: Tokenizer, label: str, texts: Sequence[str], device: torch.device, found: ItemScores
) -> dict[str, float]:
    """Bits per byte over all `texts`, each read on its own, and its standard error over the draw of documents.

    What each scored is added to `found`.
    """
    for text in texts:
        scores = text_scores(model, tokenizer, text, device)
        found.add_text(label, text.encode(), scores["nats_per_token"] * scores["tokens"], int(scores["bytes"]))
    return found.text_scores(label, "documents")
