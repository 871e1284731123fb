"""The plan of a training on a cluster says what is slower, idle, too large or beyond the store, and nothing else."""

import json
import math

import pytest
import torch

from flows.cli import main
from vectorclm.config import changed, load_experiment
from vectorclm.memory_plan import TrainingShape, checkpoint_bytes
from vectorclm.model import CausalLM
from vectorclm.planner.hardware import DEVICES, Cluster, network
from vectorclm.planner.plan import DEVICE_HOURS_BETWEEN_FAILURES, Prices, checkpoint_interval, plan_training
from vectorclm.runtime.devices import Runtime
from vectorclm.training.checkpoint import snapshot
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

BASE = load_experiment("base")[0]
COMMAND = ["estimate", "base", "--device", "h200", "--gpus-per-node", "8", "--network", "100G", "--json"]


def warnings(nodes: int, network_bits: float = 100e9, device: str = "h200", **store: float) -> str:
    cluster = Cluster(DEVICES[device], nodes, 8, network(network_bits))
    return "\n".join(plan_training(BASE, cluster, Prices(**store)).warnings)


def test_base_on_16_gpus_over_ethernet_is_slower_than_on_8(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for nodes in (1, 2):
        assert main([*COMMAND, "--nodes", str(nodes), "--price", "3.50"]) == 0
        found[nodes] = json.loads(capsys.readouterr().out)
    assert found[2]["step"]["seconds"] > found[1]["step"]["seconds"]
    assert found[1]["warnings"] == [] and "8 ranks are faster" in found[2]["warnings"][0]
    step = found[2]["step"]
    assert step["seconds"] == pytest.approx(step["compute"] + step["gradients"] + step["muon"])
    beside = found[2]["validation_seconds"] + found[2]["sample_seconds"]
    hours = (step["seconds"] * found[2]["steps"] + beside) / 3600
    assert 0 < beside < 0.05 * 3600 * hours
    assert found[2]["hours"] == pytest.approx(hours) and found[2]["cost"] == pytest.approx(16 * 3.5 * hours)
    assert found[1]["efficiency"] > 0.75 > 0.5 > found[2]["efficiency"]


def test_a_faster_network_or_a_larger_batch_makes_more_gpus_worth_it() -> None:
    assert "faster" in warnings(2) and "faster" not in warnings(2, 3200e9)
    larger = changed(BASE, {"pretrain.batch_size": 8192})
    cluster = Cluster(DEVICES["h200"], 2, 8, network(100e9))
    assert plan_training(larger, cluster).warnings == ()


def test_each_limit_is_named_where_it_breaks_and_not_before() -> None:
    assert "have nothing to do" not in warnings(64) and "8 of 520 ranks have nothing to do" in warnings(65)
    assert "MB a second and the store gives 10" in warnings(1, store_bytes=10e6)
    assert "the store gives" not in warnings(1)
    tall = changed(
        BASE, {"model.hidden_size": 16_384, "model.intermediate_size": 49_152, "model.num_hidden_layers": 64}
    )
    cluster = Cluster(DEVICES["h100"], 1, 8, network(100e9))
    assert "take a device with more memory" in "\n".join(plan_training(tall, cluster).warnings)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "h300"], "knows no device 'h300': choose h200"),
        (["--network", "fast"], "'fast' is no speed"),
        (["--network=-1G"], "is no speed"),
        (["--nodes", "0"], "nodes is 0"),
        (["--gpus-per-node", "0"], "gpus-per-node is 0"),
    ],
)
def test_wrong_options_say_what_to_give(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "base", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_dry_run_has_the_same_hours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND[:4], "--gpus-per-node", "1", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    from flows.reports.cost_estimate import budget
    from vectorclm.stages import plans

    assert budget(BASE, plans(BASE))["hours"]["H200"] == pytest.approx(alone["hours"])


def test_the_checkpoint_has_the_planned_bytes() -> None:
    config = load_experiment("tiny")[0].model
    model = CausalLM(config)
    optimizers = build_optimizers(model, OptimizerConfig(learning_rate=0.01, adamw_learning_rate=0.01))
    ids = torch.full((1, 8), 7)
    model.loss(ids, ids).backward()  # type: ignore[no-untyped-call]
    for optimizer in optimizers:
        optimizer.step()
    saved = snapshot(1, model, optimizers, "", "")
    size = sum(tensor.nbytes for part in (saved.model, saved.optimizers) for tensor in part.values())
    assert checkpoint_bytes(TrainingShape(config, 256)) == pytest.approx(size, rel=0.001)


def test_the_interval_of_checkpoints_costs_the_least() -> None:
    """Compared with Daly's whole cost (FGCS 2006, equation 20) at other intervals."""
    cost, ranks = 20.0, 4096
    between = 3600 * DEVICE_HOURS_BETWEEN_FAILURES / ranks

    def spent(interval: float) -> float:
        return between / interval * (math.exp((interval + cost) / between) - 1)

    best = checkpoint_interval(cost, ranks)
    assert best == pytest.approx(math.sqrt(2 * cost * between), rel=0.05)  # Young's
    assert spent(best) < min(spent(0.8 * best), spent(1.25 * best))
    assert checkpoint_interval(3 * between, ranks) == between


def test_the_planner_has_the_constants_of_the_code_that_it_plans() -> None:
    """Those modules import torch, which a plan does not need."""
    from vectorclm import memory_plan
    from vectorclm.bench import gpu
    from vectorclm.nn import attention, loss
    from vectorclm.planner import step, traffic
    from vectorclm.runtime import distributed

    assert (memory_plan.CHUNK, memory_plan.GPU_CHUNK) == (loss.CHUNK, loss.GPU_CHUNK)
    assert memory_plan.QUERY_BLOCK == attention.QUERY_BLOCK
    assert traffic.BUCKET == distributed.BUCKET
    assert step.DOCUMENT_TOKENS == gpu.DOCUMENT
    assert Runtime().windows_at_once(1, torch.device("cpu")) == 2**12
