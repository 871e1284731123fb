"""Validation and samples are divided over the ranks: the same scores and answers, each window computed once."""

import json
import subprocess
import sys

import numpy as np
import pytest

from flows.execution.launch import under_torchrun
from tests.conftest import publish_shards

# Measures with a random model; each rank prints its results, the windows that it computed, and the prompts it answered.
MEASURE = """
import json, sys
import torch
from vectorclm import validation
from vectorclm.config import load_experiment
from vectorclm.evaluation import bits_per_byte
from vectorclm.evaluation.bits_per_byte import HeldOutWindows
from vectorclm.model import CausalLM
from vectorclm.runtime.preemption import preemption
from vectorclm.runtime.ranks import joined
from vectorclm.shards.reader import open_shards
from vectorclm.store.artifact import Store
from vectorclm.train_config import GenerationSamplesConfig

store, fingerprint = sys.argv[1:]
tiny = load_experiment("tiny")[0]
model_config = tiny.model.model_copy(update={"vocab_size": 307, "num_hidden_layers": 1})
config = tiny.pretrain.model_copy(update={
    "validation_windows": 5, "samples": GenerationSamplesConfig(prompts=["a", "b", "c"], interval=1),
})
losses, rows, asked = bits_per_byte.token_losses, [], []
def counted(model, input_ids, *args):
    rows.append(len(input_ids))
    return losses(model, input_ids, *args)
bits_per_byte.token_losses = counted
def respond(model, prompt, longest):
    asked.append(prompt)
    return prompt + "!"

with joined() as group:
    group.call("work")
    torch.manual_seed(0)
    model = CausalLM(model_config)
    with open_shards(Store(store).find("shards", fingerprint), "train") as readers:
        held_out = HeldOutWindows(readers, [1] * 307, config.document_mask)
        measurements = validation.Measurements(model, config, held_out, 2, respond, group)
        found = {kind: measurements.measure(kind) for kind in measurements.due(1, 1)}
        computed = sum(rows)
        preemption.begin_training()
        preemption.requested = group.rank == group.world_size - 1
        found["stopped"] = [measurements.measure(kind) for kind in measurements.due(1, 1)]
        preemption.requested = False
    line = json.dumps([group.rank, found, computed, asked])
    sys.stdout.write("found " + line + chr(10))
    sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[object]]]:
    """What each rank found, by the number of ranks: 5 of the 7 windows of one source, and the one window of another."""
    folder = tmp_path_factory.mktemp("validation")
    draws = np.random.default_rng(0)
    sources = {
        label: {"input_ids": draws.integers(5, 307, (count, 256)).astype(np.uint16)}
        for label, count in {"many": 7, "one": 1}.items()
    }
    artifact = publish_shards(str(folder / "store"), folder / "work", sources, 4096)
    found = {}
    for ranks in (1, 2):
        command = [sys.executable, "-c", MEASURE, str(folder / "store"), artifact.fingerprint]
        command = under_torchrun(command, ranks, 1) if ranks > 1 else command
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        lines = [line.partition("found ")[2] for line in done.stdout.splitlines() if "found " in line]
        found[ranks] = sorted(json.loads(line) for line in lines)
    return found


def test_two_ranks_have_the_scores_and_samples_of_one(measured: dict[int, list[list[object]]]) -> None:
    ((_, alone, _, _),), (first, second) = measured[1], measured[2]
    assert first[1] == second[1]  # on both ranks
    for label, scores in alone["validation"].items():
        assert first[1]["validation"][label] == pytest.approx(scores, abs=1e-6)
    assert first[1]["samples"] == alone["samples"] == [{"prompt": it, "answer": f"{it}!"} for it in "abc"]


def test_no_window_is_computed_and_no_prompt_answered_twice(measured: dict[int, list[list[object]]]) -> None:
    assert [(computed, asked) for *_, computed, asked in measured[1]] == [(6, ["a", "b", "c"])]
    (first, first_asked), (second, second_asked) = [(computed, asked) for *_, computed, asked in measured[2]]
    assert first + second == 6 and 2 <= first <= 4
    assert (first_asked[:2], second_asked) == (["a", "c"], ["b"])


def test_sigterm_on_one_rank_leaves_no_measurement_on_any(measured: dict[int, list[list[object]]]) -> None:
    assert all(found["stopped"] == [None, None] for ranks in measured.values() for _, found, *_ in ranks)
