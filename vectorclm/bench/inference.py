"""`vectorclm bench generate` and `bench evaluate`: speed against transformers and the evaluation harness.

Both sides read the same model directory, which has the shape of `base` and random weights.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vectorclm.bench.data import prepare
from vectorclm.bench.table import Row, compared, could_not_run, in_turns
from vectorclm.config import load_experiment
from vectorclm.corpus.sources import drawn
from vectorclm.evaluation.multiple_choice import Item, accuracies, read_items
from vectorclm.evaluation.tasks import read_task
from vectorclm.export.hugging_face import write_model_files
from vectorclm.inference.generate import generate, generate_batch
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.temporary import temporary_folder

PROMPT, NEW = 64, 64  # tokens
FASTER = {1: 1.4, 16: 1.3}  # bounds on the speed over transformers, by the number of prompts in a batch
EVALUATED = "4 choices by log-likelihood against the harness's HF backend"
QUESTIONS = 40
TEXT_BYTES = 12_000_000  # text for the tokenizer
MICRO_BATCH = 16  # in one forward pass: the harness counts choices, we count questions


def generating(rounds: int, experiment: str = "base") -> Iterator[Row]:
    """Speed of greedy generation from random prompts, for each batch size."""
    config = load_experiment(experiment)[0].model
    with temporary_folder("bench-") as folder:
        _random_model(config, folder)
        for batch, ask in FASTER.items():
            arguments = (folder, batch)
            found, _ = in_turns(rounds, {"ours": (_generate, arguments), "peer": (_transformers, arguments)})
            ours, peer = ([batch * NEW / seconds for seconds, _ in found[side]] for side in ("ours", "peer"))
            row = compared(f"generation, batch {batch}", ours, peer, "tokens/s", ask=ask, most=False)
            same = torch.tensor(found["ours"][0][1]).eq(torch.tensor(found["peer"][0][1])).sum()
            yield replace(row, why=f"{same} of {batch * NEW} tokens are the same; {row.why}")


def _random_model(config: ModelConfig, folder: Path) -> None:
    torch.manual_seed(1)
    CausalLM(config).save_pretrained(folder)


def _prompts(vocab_size: int, batch: int) -> torch.Tensor:
    return torch.randint(5, vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(2))


def _timed(work: Callable[[], Any]) -> Callable[[], tuple[float, Any]]:
    """A function that runs `work` and returns the seconds and the result; one run is done here as a warm-up."""

    def once() -> tuple[float, Any]:
        began = time.perf_counter()
        returned = work()
        return time.perf_counter() - began, returned

    once()
    return once


def _generate(folder: Path, batch: int) -> Callable[[], tuple[float, Any]]:
    Runtime().configure_torch()
    model = CausalLM.from_pretrained(folder)
    prompts = _prompts(model.config.vocab_size, batch)
    if batch == 1:
        return _timed(lambda: [list(generate(model, prompts[0].tolist(), NEW, stop_ids=()))])
    return _timed(lambda: generate_batch(model, prompts, NEW, stop_ids=()).tolist())


def _transformers(folder: Path, batch: int) -> Callable[[], tuple[float, Any]]:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(Runtime().threads_each(1))
    model: Any = AutoModelForCausalLM.from_pretrained(folder)  # in evaluation mode
    prompts = _prompts(model.config.vocab_size, batch)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompts)
    return _timed(lambda: model.generate(prompts, **options)[:, PROMPT:].tolist())


def evaluating(rounds: int, data: Path | None, experiment: str = "base") -> Iterator[Row]:
    """Speed of scoring questions with four choices: HellaSwag from the mirror `data`, or the generated world."""
    if find_spec("lm_eval") is None:
        why = "the harness is not installed: pip install -c constraints.txt 'vectorclm[bench]'"
        yield could_not_run(EVALUATED, "choices/s", 2.5, why)
        return
    with temporary_folder("bench-") as folder:
        items = _questions(folder, data, experiment)
        found, _ = in_turns(rounds, {"ours": (_ours, (folder, items)), "peer": (_harness, (folder, items))})
    choices = sum(len(item.choices) for item in items)
    ours, peer = ([choices / seconds for seconds, _ in found[side]] for side in ("ours", "peer"))
    row = compared(EVALUATED, ours, peer, "choices/s", ask=2.5, most=False)
    mine, theirs = found["ours"][0][1], found["peer"][0][1]
    scores = f"acc and acc_norm {mine[0]:.4f} and {mine[1]:.4f}, the harness's {theirs[0]:.4f} and {theirs[1]:.4f}"
    yield replace(row, met=bool(row.met and mine == theirs), why=f"{len(items)} questions; {scores}; {row.why}")


def _questions(folder: Path, data: Path | None, experiment: str) -> list[Item]:
    """Read the questions; write a random model and a small tokenizer to `folder`."""
    from vectorclm.evaluation.harness_tasks import build_tasks

    with temporary_folder("bench-") as work:
        text = prepare(work, data, TEXT_BYTES)
        source = text.experiment.evaluate.tasks[0].model_copy(update={"limit": QUESTIONS})
        rows, seed = read_task(source, data, text.experiment.world), text.experiment.seed
        if source.task is None:
            items = read_items(source, rows, seed)
        else:
            (task,) = build_tasks(source, rows).values()
            docs = [task.eval_docs[number] for number in drawn(source, len(task.eval_docs), seed)]
            items = [_item(task, doc) for doc in docs]
        shape, vocabulary = load_experiment(experiment)[0].model, text.experiment.model.vocab_size
        _random_model(shape.model_copy(update={"vocab_size": vocabulary}), folder)
        write_model_files(text.folder("tokenizer"), shape.max_position_embeddings, chat=False, out=folder)
    return items


def _item(task: Any, doc: Any) -> Item:
    choices = tuple(f" {choice}" for choice in task.doc_to_choice(doc))
    return Item(task.doc_to_text(doc), choices, int(task.doc_to_target(doc)))


def _ours(folder: Path, items: Sequence[Item]) -> Callable[[], tuple[float, Any]]:
    from vectorclm.evaluation.harness import VectorCLM

    return _scoring(VectorCLM(folder, MICRO_BATCH), items)


def _harness(folder: Path, items: Sequence[Item]) -> Callable[[], tuple[float, Any]]:
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(Runtime().threads_each(1))
    device = Runtime().torch_device()
    return _scoring(HFLM(str(folder), device=str(device), dtype="float32", batch_size=MICRO_BATCH), items)


def _scoring(lm: Any, items: Sequence[Item]) -> Callable[[], tuple[float, Any]]:
    """A function that answers the harness's requests with one of its models and returns `acc` and `acc_norm`."""
    from lm_eval.api.instance import Instance

    docs: list[dict[str, Any]] = [{"number": number} for number in range(len(items))]
    requests = [
        Instance("loglikelihood", doc, (item.context, choice), number)
        for doc, item in zip(docs, items, strict=True)
        for number, choice in enumerate(item.choices)
    ]

    def scores() -> tuple[float, float]:
        values = iter(value for value, _ in lm.loglikelihood(requests, disable_tqdm=True))
        found = accuracies(items, [[next(values) for _ in item.choices] for item in items])
        return found["acc"], found["acc_norm"]

    return _timed(scores)
