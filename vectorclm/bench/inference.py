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
from vectorclm.bench.gguf import NEAR_TIE
from vectorclm.bench.table import Row, compared, could_not_run, in_turns
from vectorclm.config import load_experiment
from vectorclm.corpus.sources import drawn
from vectorclm.evaluation.multiple_choice import Item, accuracies, read_items
from vectorclm.evaluation.tasks import read_task
from vectorclm.export.hugging_face import write_model_files
from vectorclm.inference.batch import BatchSequence, ContinuousBatch
from vectorclm.inference.generate import generate, generate_batch
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.temporary import temporary_folder

PROMPT, NEW = 64, 64  # tokens
FASTER = {1: 1.4, 16: 1.3}  # bounds on the speed over transformers, by the number of prompts in a batch
CLIENTS, TOGETHER = 8, 3.0  # answers at once, and the bound on their speed over one at a time
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
        yield _serving(rounds, folder)


def _serving(rounds: int, folder: Path) -> Row:
    """Speed of answers that share the steps of one batch, as `vectorclm serve` generates them, over one at a time."""
    found, _ = in_turns(rounds, {"ours": (_in_one_batch, (folder,)), "peer": (_one_at_a_time, (folder,))})
    ours, peer = ([CLIENTS * NEW / seconds for seconds, _ in found[side]] for side in ("ours", "peer"))
    row = compared(f"{CLIENTS} answers at once over one at a time", ours, peer, "tokens/s", ask=TOGETHER, most=False)
    model = CausalLM.from_pretrained(folder).eval()
    prompts = _client_prompts(model.config.vocab_size)
    sides = zip(prompts, found["peer"][0][1], found["ours"][0][1], strict=True)
    counts = [differing_tokens(model, prompt, alone, batched) for prompt, alone, batched in sides]
    near, other = (sum(count) for count in zip(*counts, strict=True))
    lengths = f"{CLIENTS} prompts of {len(prompts[0])} to {len(prompts[-1])} tokens"
    same = f"{near} near-ties and {other} other differences in the greedy tokens"
    return replace(row, met=bool(row.met and not other), why=f"{lengths}; {same}; {row.why}")


def differing_tokens(
    model: CausalLM, prompt: Sequence[int], alone: Sequence[int], batched: Sequence[int]
) -> tuple[int, int]:
    """Whether two greedy continuations differ: the numbers (0 or 1) of near-ties and of other differences.

    Only the first difference counts, because all tokens after it follow from it. A near-tie has two logits within
    NEAR_TIE, and rounding decides between them.
    """
    if list(alone) == list(batched):
        return 0, 0
    pairs = enumerate(zip(alone, batched, strict=True))
    at, mine, other = next((at, mine, other) for at, (mine, other) in pairs if mine != other)
    with torch.inference_mode():
        logits_V = model(torch.tensor([[*prompt, *alone[:at]]]))[0, -1]
    is_near = bool((logits_V[mine] - logits_V[other]).abs() < NEAR_TIE)
    return int(is_near), int(not is_near)


def _client_prompts(vocab_size: int) -> list[list[int]]:
    """Prompts of different lengths, one for each client."""
    draw = torch.Generator().manual_seed(3)
    sizes = [PROMPT // CLIENTS * (number + 1) for number in range(CLIENTS)]
    return [torch.randint(5, vocab_size, (size,), generator=draw).tolist() for size in sizes]


def _in_one_batch(folder: Path) -> Callable[[], tuple[float, Any]]:
    Runtime().configure_torch()
    model = CausalLM.from_pretrained(folder).eval()
    prompts = _client_prompts(model.config.vocab_size)
    batch: ContinuousBatch[BatchSequence] = ContinuousBatch(model, CLIENTS)

    def answers() -> list[list[int]]:
        sequences = [BatchSequence(list(prompt)) for prompt in prompts]
        for sequence in sequences:
            batch.add(sequence)
        ends = {id(sequence): len(sequence.ids) + NEW for sequence in sequences}
        while len(batch):
            for sequence, logits_TV in batch.step():
                sequence.ids.append(int(logits_TV[-1].argmax()))
                if len(sequence.ids) == ends[id(sequence)]:
                    batch.remove(sequence)
        return [sequence.ids[-NEW:] for sequence in sequences]

    return _timed(answers)


def _one_at_a_time(folder: Path) -> Callable[[], tuple[float, Any]]:
    Runtime().configure_torch()
    model = CausalLM.from_pretrained(folder)
    prompts = _client_prompts(model.config.vocab_size)
    return _timed(lambda: [list(generate(model, prompt, NEW, stop_ids=())) for prompt in prompts])


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
