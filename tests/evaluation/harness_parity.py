"""By hand: every task of the suites, item by item, beside the harness's own Hugging Face backend.

python -m tests.evaluation.harness_parity MODEL DATA [ITEMS]: a line for each task, with the largest difference of a
log-likelihood, the items that are right on one side only, and those of them that are near-ties: two choices within
NEAR of each other.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM

from vectorclm.config import load_suite
from vectorclm.corpus.sources import TaskSource, drawn
from vectorclm.evaluation.harness import VectorCLM
from vectorclm.evaluation.harness_tasks import build_tasks
from vectorclm.evaluation.tasks import read_task
from vectorclm.lineage.pinning import pin_suite

NEAR = 1e-4
NEW_TOKENS = 128


def samples(lm: Any, source: TaskSource, data: Path) -> list[Mapping[str, Any]]:
    """What a model answers to a draw of a task's items."""
    tasks = build_tasks(source, read_task(source, data, None))
    places = [(name, number) for name, task in tasks.items() for number in range(len(task.eval_docs))]
    for task in tasks.values():
        if task.OUTPUT_TYPE == "generate_until":  # the backend refuses answers as long as the context
            task.config.generation_kwargs["max_gen_toks"] = NEW_TOKENS
    chosen: dict[str, list[int]] = {}
    for place in drawn(source, len(places), 1):
        chosen.setdefault(places[place][0], []).append(places[place][1])
    asked = {"tasks": {name: tasks[name] for name in chosen}}
    found = lm_eval.evaluate(lm, asked, samples=chosen, bootstrap_iters=0, confirm_run_unsafe_code=True)["samples"]
    return [sample for of_task in found.values() for sample in of_task]


def values(sample: Mapping[str, Any]) -> list[Any]:
    return [answer[0][0] if isinstance(answer[0], tuple | list) else answer[0] for answer in sample["resps"]]


def compared(mine: Sequence[Mapping[str, Any]], judged: Sequence[Mapping[str, Any]]) -> str:
    """One task's line."""
    worst, differing, near, texts = 0.0, 0, 0, 0
    for a, b in zip(mine, judged, strict=True):
        assert a["arguments"] == b["arguments"]
        if isinstance(values(a)[0], str):
            texts += values(a) == values(b)
            continue
        worst = max(worst, *(abs(x - y) / max(1.0, abs(y)) for x, y in zip(values(a), values(b), strict=True)))
        if any(a[key] != b[key] for key in ("acc", "acc_norm") if key in a):
            differing += 1
            lengths = [len(text) for _, text in a["arguments"]]
            for scale in ([1.0] * len(lengths), lengths):
                best = sorted((value / size for value, size in zip(values(b), scale, strict=True)), reverse=True)
                near += len(best) > 1 and best[0] - best[1] < NEAR
    if isinstance(values(mine[0])[0], str):
        return f"{len(mine):>5} items  {texts} answers are the same"
    scores = ", ".join(
        f"{key} {sum(s[key] for s in mine) / len(mine):.4f} and {sum(s[key] for s in judged) / len(judged):.4f}"
        for key in ("acc", "acc_norm")
        if key in mine[0]
    )
    return f"{len(mine):>5} items  {scores}  largest difference {worst:.1e}  {differing} differ, {near} near-ties"


def main(model: str, data: Path, items: int) -> None:
    mine, judge = VectorCLM(model), HFLM(model, device="cpu", dtype="float32", batch_size=16)
    rolling = HFLM(model, device="cpu", dtype="float32", batch_size=1)
    rolling.tokenizer._tokenizer.post_processor = None  # else BOS itself is scored, after BOS
    for suite in ("standard", "generation"):
        pinned, _ = pin_suite(load_suite(suite)[0], Path(f"{suite}.toml"), data)
        for task in pinned.tasks:
            few = {"limit": max(2, items // 20) if suite == "generation" or task.label == "wikitext-2" else items}
            source = task.model_copy(update=few)
            other = rolling if task.label == "wikitext-2" else judge
            line = compared(samples(mine, source, data), samples(other, source, data))
            print(f"{task.label:<16}{line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 200)
