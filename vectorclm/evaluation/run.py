"""Any model on any suite: its benchmarks, bits per byte of held-out text, and for a chat model the template.

A suite is a file of benchmarks, or the evaluation of an experiment. The result is an artifact addressed by the model's
content, so a model that was measured is found again, however it is called and wherever it lies.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from vectorclm.comparison.measurement import training_text
from vectorclm.config import Suite
from vectorclm.corpus.decontamination import contaminated
from vectorclm.corpus.sample_reader import SampleFiles
from vectorclm.corpus.sources import TaskSource
from vectorclm.evaluation.bits_per_byte import text_scores
from vectorclm.evaluation.instruction_prompts import instructions
from vectorclm.evaluation.instructions import instruction_scores
from vectorclm.evaluation.item_scores import ItemScores
from vectorclm.evaluation.tasks import score_tasks
from vectorclm.inference.generate import Sampling, answer_text, continuation, template_scores
from vectorclm.inference.load import open_model
from vectorclm.lineage.chain import trained_on
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.progress import Progress
from vectorclm.shards.chat_writer import read_prompts
from vectorclm.store.artifact import Artifact, Plan, Store
from vectorclm.store.layout import STAGE
from vectorclm.store.model_ref import Model


def _scores(
    suite: Suite,
    tasks: Sequence[TaskSource],
    plan: Plan,
    model: Model,
    store: Store,
    runtime: Runtime,
    data: Path | None,
    out: Path,
    found: ItemScores,
) -> dict[str, Any]:
    config, device = plan.config, runtime.configure_torch()
    folder = model.local()
    loaded, tokenizer = open_model(folder, model.address)
    loaded = loaded.to(device)
    inputs = {name: store.find(name, plan.inputs[name]) for name in config["data"] if name in plan.inputs}
    sample, conversations = inputs.get("sample"), inputs.get("chat_shards")
    drawn_from = suite.experiment.sample.sources if sample is not None and suite.experiment is not None else []
    labels = [source.label for source in drawn_from]
    scores: dict[str, Any] = {"text": {}, "tasks": {}}
    if "not_run" in config:
        scores["not_run"] = config["not_run"]
    with Progress(STAGE, len(labels) + len(tasks) + 1, "parts") as progress:
        for label in labels:
            assert sample is not None
            texts = _documents(sample, label, config["documents"], suite.seed)
            scores["text"][label] = documents_scores(loaded, tokenizer, label, texts, device, found)
            progress.advance(1, label)
        where, template = (suite.seed, runtime, data, suite.world), "template" in config
        for kind, label, scored in score_tasks(tasks, folder, loaded, tokenizer, *where, found, template=template):
            scores[kind][label] = scored
            progress.advance(1, label)
        if read := trained_on(model, store):
            repeated = contaminated(found.contents, training_text(read, tokenizer))
            for label, marks in found.mark(repeated.tolist()).items():
                scores["tasks"][label] |= marks
        how = config["max_new_tokens"], Sampling(repetition_penalty=config.get("repetition_penalty", 1))
        if conversations is not None:
            prompts = read_prompts(conversations, config["chat_prompts"], suite.seed)
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
