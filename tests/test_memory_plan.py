"""The memory plan is what a step allocates; activation checkpointing keeps the bytes of a training and saves memory."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.runtime.test_distributed import INPUTS, experiment, inputs  # noqa: F401
from vectorclm.config import load_experiment
from vectorclm.dataset import Batch, position_ids
from vectorclm.memory_plan import TrainingShape, choose_plan, plan_for, plan_memory
from vectorclm.model import CausalLM, DecoderLayer
from vectorclm.model_config import ModelConfig
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store
from vectorclm.tokenizer import EOS_ID
from vectorclm.train_step import TrainStep
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

BENCHMARKS = (Path(__file__).parents[1] / "BENCHMARKS.md").read_text(encoding="utf-8")
LARGE = ModelConfig(
    vocab_size=32_768,
    hidden_size=2048,
    intermediate_size=5120,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=2048,
)


def small(vocabulary: int, width: int, layers: int, key_heads: int = 2) -> ModelConfig:
    return LARGE.model_copy(
        update={
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 5 * width // 2,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": key_heads,
            "head_dim": width // 4,
        }
    )


def trained(model: ModelConfig, shape: TrainingShape, windows: int, again: bool) -> CausalLM:
    """A model after two steps of two micro-batches."""
    torch.manual_seed(0)
    decoder = CausalLM(model)
    decoder.model.activation_checkpointing = again
    optimizers = build_optimizers(decoder, OptimizerConfig(learning_rate=1e-3, adamw_learning_rate=1e-3))
    ids = torch.randint(5, model.vocab_size, (2 * windows, shape.window_tokens))
    ids[torch.rand(ids.shape) < 1 / 80] = EOS_ID
    positions = torch.from_numpy(position_ids(ids.numpy())) if shape.document_mask else None
    step = TrainStep(decoder, optimizers, 1.0, windows)
    for _ in range(2):
        step(Batch(ids, ids.clone(), positions))
    return decoder


def allocated_peak(folder: Path, model: ModelConfig, shape: TrainingShape, windows: int, again: bool) -> int:
    """The most bytes that torch held at once, as its allocator counts them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trained(model, shape, windows, again)
    trace = folder / "trace.json"
    seen.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = [event["args"] for event in sorted(events, key=lambda event: event["ts"])]
    before = held[0]["Total Allocated"] - held[0]["Bytes"]  # left over from earlier profiles
    return max(each["Total Allocated"] for each in held) - before  # type: ignore[no-any-return]


CASES = [
    (small(512, 64, 6), 128, 4, True),
    (small(512, 64, 8), 128, 8, False),
    (small(1024, 128, 4), 256, 2, False),
    (small(4096, 64, 2, 4), 128, 2, True),
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_plan_is_what_a_step_allocates(case: tuple[ModelConfig, int, int, bool], tmp_path: Path) -> None:
    model, length, windows, apart = case
    shape = TrainingShape(model, length, "cpu", apart)
    peaks = []
    for again in (False, True):
        planned = plan_memory(shape, windows, activation_checkpointing=again).bytes
        peaks.append(allocated_peak(tmp_path, model, shape, windows, again))
        assert planned == pytest.approx(peaks[-1], rel=0.1)
    assert peaks[1] < peaks[0]


def test_the_plan_is_what_the_benchmark_measured_on_a_gpu() -> None:
    """Nothing of the plan is fitted to these rows."""
    (both,) = re.findall(r"^\| peak memory \|.*\*\*([\d.]+) GB\*\* \(([\d.]+) GB with 64 windows", BENCHMARKS, re.M)
    base = load_experiment("base")[0].model
    for windows, measured in zip((128, 64), both, strict=True):
        planned = plan_memory(TrainingShape(base, 1024), windows).bytes
        assert planned == pytest.approx(1e9 * float(measured), rel=0.1)


def test_a_model_of_a_billion_parameters_trains_on_one_gpu_of_80_gb() -> None:
    shape = TrainingShape(LARGE, 2048)
    assert 0.98e9 < LARGE.parameters < 1.02e9
    whole = choose_plan(shape, 512, 64, 80e9)
    assert not whole.activation_checkpointing and 8 <= whole.windows < 64 and whole.bytes < 0.9 * 80e9
    again = choose_plan(shape, 512, 64, 80e9, "on")
    assert again.windows == 64 and again.bytes < 0.9 * 80e9
    assert plan_memory(shape, whole.windows + 1).bytes > 0.9 * 80e9  # the largest that fits
    smaller = choose_plan(shape, 512, 64, 32e9)
    assert smaller.activation_checkpointing and smaller.windows > choose_plan(shape, 512, 64, 32e9, "off").windows
    assert choose_plan(shape, 4, 64, 80e9).windows == 4  # a rank's own
    assert choose_plan(shape, 512, 64, 1e9, "off").windows == 1


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("apart", [True, False])
def test_activation_checkpointing_keeps_every_bit(dropout: float, apart: bool) -> None:
    model = small(512, 64, 3).model_copy(update={"hidden_dropout": dropout, "attention_dropout": dropout})
    shape = TrainingShape(model, 160, "cpu", apart)
    one, other = (trained(model, shape, 2, again).state_dict() for again in (False, True))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_a_training_with_the_setting_has_the_same_fingerprint_and_bytes(
    inputs: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, passes = experiment(inputs, "even"), Counter[str]()
    plain = DecoderLayer.forward

    def counted(self: DecoderLayer, *args: Any, **kwargs: Any) -> torch.Tensor:
        passes[setting] += 1
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DecoderLayer, "forward", counted)
    made = []
    for setting in ("off", "on"):
        store = inputs / f"again-{setting}"
        store.mkdir()
        for stage in INPUTS:
            (store / stage).symlink_to(inputs / "inputs" / stage)
        runtime = Runtime(device="cpu", threads=1, activation_checkpointing=setting)
        run_stage("pretrain", config, Store(str(store)), runtime, None)
        (path,) = store.glob("pretrain/*/model.safetensors")
        made.append((path.parent.name, path.read_bytes()))
    assert made[0] == made[1] and made[0][0] == plans(config)["pretrain"].fingerprint
    steps = config.pretrain.tokens // config.pretrain.batch_size // config.shards.sequence_length
    assert passes["on"] - passes["off"] == steps * config.model.num_hidden_layers  # each once more


def test_the_machines_settings_decide_where_they_are_set() -> None:
    shape, device = TrainingShape(small(512, 64, 3), 128, "cpu"), torch.device("cpu")
    free = plan_for(shape, 100, Runtime(), device, 1)
    assert (free.windows, free.activation_checkpointing) == (32, False)  # 4,096 tokens, as memory is enough
    given = plan_for(shape, 100, Runtime(micro_batch_size=7, activation_checkpointing="on"), device, 1)
    assert (given.windows, given.activation_checkpointing) == (7, True)
    huge = plan_for(shape, 10**9, Runtime(micro_batch_size=10**8), device, 1)
    assert (huge.windows, huge.activation_checkpointing) == (10**8, True)  # does not fit without
