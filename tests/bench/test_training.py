"""A batch is continued as transformers continues it, and every bench of the core runs whole on small models."""

import io
import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from tests.conftest import in_turn, random_model, skip_or_fail
from tests.test_model import CONFIG
from vectorclm.bench.inference import evaluating, generating
from vectorclm.bench.table import Row, show
from vectorclm.bench.training import Size, optimizing, training
from vectorclm.config import load_experiment
from vectorclm.inference.generate import generate, generate_batch
from vectorclm.tokenizer import PAD_ID

GENERATOR = torch.Generator().manual_seed(4)


def test_a_batch_continues_as_transformers_and_as_each_prompt_alone(tmp_path: Path) -> None:
    model = random_model(CONFIG)
    model.save_pretrained(tmp_path)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts = torch.randint(5, CONFIG.vocab_size, (3, 20), generator=GENERATOR)
    ours = generate_batch(model, prompts, 100, stop_ids=())  # to the end of the context
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 44, "min_new_tokens": 44, "pad_token_id": PAD_ID}
    theirs = judge.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
    assert torch.equal(ours, theirs[:, 20:])
    stops = [int(ours[0, 3]), int(ours[1, 1]), int(ours[2, 7])]
    stopped = generate_batch(model, prompts, 100, stop_ids=stops)
    for row, prompt in zip(stopped, prompts, strict=True):
        alone = list(generate(model, prompt.tolist(), 100, stop_ids=stops))
        assert row.tolist() == alone + [PAD_ID] * (stopped.shape[1] - len(alone))


def rows_of(bench: Iterable[Row]) -> list[dict[str, object]]:
    written = io.StringIO()
    show(bench, Console(file=written), as_json=True)
    rows = [json.loads(line) for line in written.getvalue().splitlines()]
    assert all({"name", "ours", "peer", "ratio", "unit", "ask", "met"} <= set(row) for row in rows)
    return rows


@in_turn(0, 3)
def test_bench_train_and_optimizer_run_whole() -> None:
    size = Size("tiny", load_experiment("tiny")[0].model, 1, 32, 2, 1, 0.0, 0.0001, 1e6)
    rows = rows_of(training(1, [size]))
    assert [row["met"] for row in rows] == [True] * 5  # accumulation 1, 2 and 4; share of the peak; memory
    assert all(row["ours"] for row in [*rows, *rows_of(optimizing(1, "tiny", layers=1))])


@in_turn(1, 3)
def test_bench_generate_makes_transformers_tokens() -> None:
    alone, batch, together = rows_of(generating(1, "tiny"))
    assert str(alone["why"]).startswith("64 of 64 tokens are the same")
    assert str(batch["why"]).startswith("1024 of 1024 tokens are the same")
    assert "and 0 other differences in the greedy tokens" in str(together["why"])


@in_turn(2, 3)
def test_bench_evaluate_scores_as_the_harness() -> None:
    (row,) = rows_of(evaluating(1, None, "tiny"))
    if find_spec("lm_eval") is None:
        assert row["met"] is None and "pip install" in str(row["why"])
        skip_or_fail("pip install -c constraints.txt -e '.[bench]'")
    accuracies = str(row["why"]).partition("acc and acc_norm ")[2].partition(";")[0]
    mine, _, theirs = accuracies.partition(", the harness's ")
    assert mine == theirs
