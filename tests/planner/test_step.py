"""The time of a step follows from single kernels and links: against a benchmark's whole step, and a shaped network."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from tests.conftest import KILLS
from tests.planner.network import BATCH, LENGTH, MODEL, steps_in_one_namespace, steps_over_a_link
from vectorclm.config import load_experiment
from vectorclm.memory_plan import TrainingShape
from vectorclm.planner.hardware import DEVICES, NETWORK_LATENCY, AttentionSpeed, Cluster, Device, Network, network
from vectorclm.planner.step import Workload, attention_seconds, step_time, update_calls
from vectorclm.planner.traffic import exchange_gradients, exchange_muon, muon_matrices, muon_share
from vectorclm.runtime.distributed import DistributedGroup
from vectorclm.runtime.group import Group
from vectorclm.runtime.watchdog import Watchdog
from vectorclm.training.muon import Muon
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

logger = logging.getLogger(__name__)
BENCHMARKS = (Path(__file__).parents[2] / "BENCHMARKS.md").read_text(encoding="utf-8")
BASE = load_experiment("base")[0]
H200 = DEVICES["h200"]


SILENT = cast(Watchdog, SimpleNamespace(moved=lambda collective: None))  # nothing is exchanged, so nothing is lost


def alone(device: Device) -> Cluster:
    return Cluster(device, 1, 1, network(100e9))


def test_the_step_of_the_benchmark_is_within_a_tenth() -> None:
    """And the kernels behind it are those that were measured alone."""
    (speed,) = re.findall(r"^\| tokens a second, whole windows \| [\d,]+ \| ([\d,]+) ", BENCHMARKS, re.M)
    work = Workload(TrainingShape(BASE.model, 1024, "cuda", False), 512, 1)
    step = step_time(work, alone(H200))
    assert work.step_tokens / step.seconds == pytest.approx(float(speed.replace(",", "")), rel=0.1)
    (share,) = re.findall(r"^\| optimizer's share of a step \| [\d.]+ \| \*\*([\d.]+)\*\*", BENCHMARKS, re.M)
    assert step.muon / step.seconds == pytest.approx(float(share), rel=0.2)
    assert attention_seconds(work.shape, 65_536, H200) == pytest.approx(0.95e-3, rel=0.02)
    assert H200.product_seconds(8192, 8192, 8192, 2) == pytest.approx(2 * 8192**3 / 787e12, rel=0.01)
    assert step.gradients == 0


def test_documents_apart_are_within_a_seventh() -> None:
    (speed,) = re.findall(r"^\| tokens a second, documents apart, [^|]+\| [\d,]+ \| ([\d,]+) ", BENCHMARKS, re.M)
    work = Workload(TrainingShape(BASE.model, 1024), 512, 1)
    found = work.step_tokens / step_time(work, alone(H200)).seconds
    assert found == pytest.approx(float(speed.replace(",", "")), rel=1 / 7)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls into torch, without views."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_the_calls_of_an_update_are_those_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where all matrices of a shape go through Newton-Schulz at once, as on a GPU."""
    from vectorclm.model import CausalLM
    from vectorclm.training import muon

    monkeypatch.setattr(muon, "orthogonalise", lambda g, steps=5: muon._newton_schulz(g.bfloat16(), steps).to(g.dtype))
    for layers in (2, 6):
        config = MODEL.model_copy(update={"num_hidden_layers": layers, "vocab_size": 300})
        model = CausalLM(config)
        hidden, _ = build_optimizers(
            model,
            OptimizerConfig(learning_rate=0.01, adamw_learning_rate=0.01, weight_decay=0.1, cautious_weight_decay=True),
        )
        assert isinstance(hidden, Muon)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        hidden.step()
        with Calls() as calls:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            hidden.step()
        assert update_calls(config) == pytest.approx(calls.count, rel=0.15)


def test_the_matrices_are_those_that_muon_divides() -> None:
    from vectorclm.model import CausalLM

    divided: dict[tuple[int, int], int] = {}

    class Recording(Group):
        def divide(self, work, rows, dtype):  # type: ignore[no-untyped-def]
            divided[tuple(rows.shape[1:])] = len(rows)
            return work(rows)

    model = CausalLM(MODEL)
    hidden, _ = build_optimizers(model, OptimizerConfig(learning_rate=0.01, adamw_learning_rate=0.01), Recording())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    hidden.step()
    assert divided == dict(muon_matrices(MODEL))


def test_two_ranks_send_the_bytes_that_the_planner_counts() -> None:
    found = steps_in_one_namespace(3)
    cluster = Cluster(DEVICES["2cpucores"], 1, 2, network(1e9))
    counted = exchange_gradients(MODEL, cluster).sent + exchange_muon(MODEL, cluster).sent
    for sent in found["bytes"]:  # both ranks on one loopback
        assert sent == pytest.approx(2 * counted, rel=0.03)


@pytest.mark.parametrize(("nodes", "per_node", "matrices"), [(1, 8, 16), (3, 8, 12), (8, 8, 3), (2, 1, 4)])
def test_ranks_share_matrices_as_the_training_divides_them(
    nodes: int, per_node: int, matrices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank in turn, in process groups that exchange nothing; a node's ranks do all its matrices between them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cluster = Cluster(H200, nodes, per_node, network(100e9))
    shares, broadcasts, sent, plain = list[int](), list[tuple[int, int]](), 0, dist.broadcast

    def broadcast(rows: torch.Tensor, src: int, group: Any) -> Any:
        broadcasts.append((src, len(rows)))
        return plain(rows, src=src, group=group)

    monkeypatch.setattr(dist, "broadcast", broadcast)

    def work(rows: torch.Tensor) -> torch.Tensor:
        shares.append(len(rows))
        return rows

    for rank in range(cluster.ranks):
        dist.init_process_group("fake", rank=rank, world_size=cluster.ranks, store=FakeStore())
        try:
            local = [rank % per_node, per_node, rank % per_node, per_node]
            node = DistributedGroup(local, SILENT) if per_node > 1 else Group()
            broadcasts.clear()
            node.divide(work, torch.ones(matrices, 4, 6), torch.float32)
            sent += sum(rows for source, rows in broadcasts if source == rank % per_node) * (per_node - 1)
        finally:
            dist.destroy_process_group()
    assert max(shares) == muon_share(matrices, cluster) and sum(shares) == nodes * matrices
    assert sent == nodes * (per_node - 1) * matrices  # none twice, and no padding


def test_a_nodes_ranks_send_muons_updates_and_no_node_to_another() -> None:
    one = exchange_muon(BASE.model, Cluster(H200, 1, 8, network(100e9)))
    assert one == exchange_muon(BASE.model, Cluster(H200, 64, 8, network(1e9)))
    assert one.sent == pytest.approx(7 / 8 * 2 * TrainingShape(BASE.model, 1024).hidden_matrices)  # bf16
    none = exchange_muon(BASE.model, Cluster(H200, 2, 1, network(100e9)))
    assert none.sent == none.seconds == exchange_gradients(BASE.model, alone(H200)).sent == 0


@pytest.mark.skipif(KILLS < 10, reason="measures time over a shaped network, for minutes: VECTORCLM_KILLS=10")
@pytest.mark.parametrize("megabits", [8, 16, 32])
def test_a_step_over_a_shaped_network_is_within_a_fifth(megabits: int) -> None:
    """The speeds are those of single kernels and of one all-reduce, measured beside the steps."""
    found = steps_over_a_link(megabits, 3)
    speeds = found["device"]
    for kernel in ("attention", "document_attention"):
        speeds[kernel] = AttentionSpeed(**speeds[kernel])
    cluster = Cluster(Device(**speeds), 2, 1, Network(found["link"], NETWORK_LATENCY))
    predicted = step_time(Workload(TrainingShape(MODEL, LENGTH, "cpu", False), BATCH, 1), cluster).seconds
    measured = min(found["seconds"])
    logger.info("%d Mb/s: predicted %.2f s, measured %.2f s", megabits, predicted, measured)
    assert predicted == pytest.approx(measured, rel=0.2)
