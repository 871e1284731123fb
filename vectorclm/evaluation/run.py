"""Score a model: benchmarks, bits per byte of held-out text, answers in the chat template, instructions followed.

The evaluation stages and the measurements of any model share this one function. They differ in what text is scored.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import psutil
import torch
from tokenizers import Tokenizer

from vectorclm.corpus.decontamination import contaminated
from vectorclm.corpus.sample_reader import SampleFiles
from vectorclm.evaluation.bits_per_byte import HeldOutWindows, text_scores, windows_scores
from vectorclm.evaluation.config import Questions
from vectorclm.evaluation.instruction_prompts import instructions
from vectorclm.evaluation.instructions import base_answer, chat_answer, instruction_scores
from vectorclm.evaluation.item_scores import ItemScores, write_scores
from vectorclm.evaluation.tasks import MICRO_BATCH, TaskSetup, score_tasks
from vectorclm.inference.config import SamplingParams
from vectorclm.inference.generate import answer_text, continuation, template_scores
from vectorclm.inference.load import LoadedModel
from vectorclm.inference.model_slices import by_model
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.progress import Progress
from vectorclm.runtime.workers import open_workers
from vectorclm.shards.chat_writer import read_prompts
from vectorclm.shards.reader import open_shards
from vectorclm.store.artifact import Artifact
from vectorclm.tokenizer import token_lengths

SCORED_BYTES = 16  # the work of a parameter, as bytes of a data set: processes for models of 2 million and more


class ShardWindows(NamedTuple):
    """All validation windows of shards, which hold the same tokens for each model of an experiment."""

    shards: Artifact
    document_mask: bool  # whether a token sees only the tokens of its own document, as in the model's training


class SampleDocuments(NamedTuple):
    """A seeded draw of the held-out documents of a sample, as text that each tokenizer encodes by itself."""

    sample: Artifact
    labels: Sequence[str]  # of the sample's sources
    limit: int  # documents of each source


class ScoringData(NamedTuple):
    """The data that a model is scored on; what is None is not scored."""

    setup: TaskSetup
    text: ShardWindows | SampleDocuments | None
    conversations: Artifact | None  # with held-out prompts
    training_text: Callable[[Tokenizer], Iterator[bytes]] | None = None  # in which the questions are looked for
    not_run: Sequence[str] = ()  # labels of tasks that cannot run on this machine


def score_model(
    loaded: LoadedModel, questions: Questions, data: ScoringData, runtime: Runtime, out: Path, stage: str
) -> dict[str, Any]:
    """Score a model on tasks, held-out text, conversations and instructions, and write the scores into `out`.

    Progress is reported under the name `stage`. Returns the content of `scores.json`.
    """
    found, scores = ItemScores(), dict[str, Any]()
    parts = _text_parts(data.text) + len(questions.tasks) + 1
    with scoring_workers(loaded.model, runtime) as runtime, Progress(stage, parts, "parts") as progress:
        scores |= {**_held_out_text(loaded, data, runtime, found, progress), "tasks": {}}
        if data.not_run:
            scores["not_run"] = list(data.not_run)
        for kind, label, scored in score_tasks(loaded, questions.tasks, data.setup, runtime, found):
            scores[kind][label] = scored
            progress.advance(1, label)
        if data.training_text is not None:
            repeated = contaminated(found.contents, data.training_text(loaded.tokenizer))
            for label, marks in found.mark(repeated.tolist()).items():
                scores["tasks"][label] |= marks
        scores |= _answers(loaded, questions, data, out, found)
        progress.advance(1, "answers")
    write_scores(out, scores, found)
    return scores


@contextmanager
def scoring_workers(model: CausalLM, runtime: Runtime) -> Iterator[Runtime]:
    """Workers that score on this machine's cores; on a GPU, this process alone. Yields the settings of each process."""
    weight, threads = model.model.embed_tokens.weight, torch.get_num_threads()
    if weight.device.type != "cpu":
        yield runtime
        return
    parameters = sum(each.numel() for each in model.parameters())
    processes = runtime.data_processes(SCORED_BYTES * parameters)
    if not runtime.data_workers:  # as many copies of the model as fit, with as much again for the work
        fitting = psutil.virtual_memory().available // (2 * weight.element_size() * parameters)
        processes = max(1, min(processes, fitting))
    each = runtime.model_copy(update={"threads": runtime.threads_each(processes)})
    try:
        with open_workers(processes):
            torch.set_num_threads(each.threads)
            yield each
    finally:
        torch.set_num_threads(threads)


def _text_parts(text: ShardWindows | SampleDocuments | None) -> int:
    """The number of sources whose documents are scored one by one; windows of all sources are scored at once."""
    match text:
        case SampleDocuments():
            return len(text.labels)
        case ShardWindows():
            return 1
        case None:
            return 0
        case _:
            assert_never(text)


def _held_out_text(
    loaded: LoadedModel, data: ScoringData, runtime: Runtime, found: ItemScores, progress: Progress
) -> dict[str, Any]:
    """The scores of held-out text: `text`, and for windows `bits_per_byte` and `loss` before it."""
    match data.text:
        case SampleDocuments(sample, labels, limit):
            text = {}
            for label in labels:
                documents = _documents(sample, label, limit, data.setup.seed)
                text[label] = documents_scores(loaded, label, documents, found)
                progress.advance(1, label)
            return {"text": text}
        case ShardWindows(shards, document_mask):
            lengths = token_lengths(loaded.tokenizer)
            with open_shards(shards, "validation", cache=runtime.block_cache) as readers:
                windows = HeldOutWindows(readers, lengths, document_mask)
                micro_batch = runtime.micro_batch_size or MICRO_BATCH
                by_source = windows_scores(loaded.model, windows, micro_batch, found=found)
            progress.advance(1, "held-out text")
            return {
                "bits_per_byte": {label: score["bits_per_byte"] for label, score in by_source.items()},
                "loss": {label: score["loss"] for label, score in by_source.items()},
                "text": {label: found.text_scores(label, "windows") for label in by_source},
            }
        case None:
            return {"text": {}}
        case _:
            assert_never(data.text)


def _answers(
    loaded: LoadedModel, questions: Questions, data: ScoringData, out: Path, found: ItemScores
) -> dict[str, Any]:
    """The scores of what the model writes: `chat`, `instructions`, and `samples` of its answers."""
    model, tokenizer, scores = loaded.model, loaded.tokenizer, dict[str, Any]()
    sampling = SamplingParams(repetition_penalty=questions.repetition_penalty)
    longest = questions.max_new_tokens
    if data.conversations is not None:
        prompts = read_prompts(data.conversations, questions.chat_prompts, data.setup.seed)
        scores["chat"] = template_scores(model, tokenizer, prompts, longest, sampling)
    if questions.instructions:
        follow = chat_answer if loaded.chat else base_answer
        asked = instructions(questions.instructions)
        respond = partial(follow, tokenizer=tokenizer, max_new_tokens=longest, sampling=sampling)
        scores["instructions"] = instruction_scores(model, respond, asked, out, found)
    say = answer_text if loaded.chat else continuation
    answers = by_model(model, say, ((prompt, longest, sampling) for prompt in questions.prompts), tokenizer)
    scores["samples"] = [
        {"prompt": prompt, "answer": text} for prompt, text in zip(questions.prompts, answers, strict=True)
    ]
    return scores


def _documents(sample: Artifact, label: str, limit: int, seed: int) -> list[str]:
    """A seeded draw of a source's held-out documents, in the order of the sample."""
    texts = list(SampleFiles(sample).texts(label, "validation"))
    chosen = random.Random(f"{seed} {label}").sample(range(len(texts)), min(limit, len(texts)))
    return [texts[i] for i in sorted(chosen)]


def documents_scores(loaded: LoadedModel, label: str, texts: Sequence[str], found: ItemScores) -> dict[str, float]:
    """Bits per byte over all `texts`, each read on its own, and the standard error over the draw of documents.

    The score of each document is added to `found`.
    """
    scored = by_model(loaded.model, text_scores, ((text, loaded.device) for text in texts), loaded.tokenizer)
    for text, scores in zip(texts, scored, strict=True):
        found.add_text(label, text.encode(), scores["nats_per_token"] * scores["tokens"], int(scores["bytes"]))
    return found.text_scores(label, "documents")
