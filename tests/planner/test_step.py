"""The time of a step follows from single kernels and links: against a benchmark's whole step, and a shaped network."""

import logging
import re
from pathlib import Path

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
from vectorclm.training.muon import Muon
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

logger = logging.getLogger(__name__)
BENCHMARKS = (Path(__file__).parents[2] / "BENCHMARKS.md").read_text(encoding="utf-8")
BASE = load_experiment("base")[0]
H200 = DEVICES["h200"]


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
    (speed,) = re.findall(r"^\| tokens a second, documents apart \| [\d,]+ \| ([\d,]+) ", BENCHMARKS, re.M)
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
        def divide(self, work, rows):  # type: ignore[no-untyped-def]
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
    cluster = Cluster(H200, 2, 1, network(1e9))
    counted = exchange_gradients(MODEL, cluster).sent + exchange_muon(MODEL, cluster).sent
    for sent in found["bytes"]:  # both ranks on one loopback
        assert sent == pytest.approx(2 * counted, rel=0.03)


@pytest.mark.parametrize("nodes", [1, 3, 8])
def test_ranks_share_and_pad_matrices_as_the_training_divides_them(nodes: int) -> None:
    """Each rank in turn, in a process group that exchanges nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cluster, worked, matrices = Cluster(H200, nodes, 8, network(100e9)), list[torch.Tensor](), 16

    def work(rows: torch.Tensor) -> torch.Tensor:
        worked.append(rows)
        return rows

    for rank in range(cluster.ranks):
        dist.init_process_group("fake", rank=rank, world_size=cluster.ranks, store=FakeStore())
        try:
            group = DistributedGroup(rank, cluster.ranks, rank % 8, 8)
            group.divide(work, torch.ones(matrices, 4, 6))
        finally:
            dist.destroy_process_group()
    share, _ = muon_share(matrices, cluster)
    assert {len(rows) for rows in worked} == {share}
    assert sum(int(rows.any(2).any(1).sum()) for rows in worked) == matrices
    padded = 1 - matrices / (share * cluster.ranks)
    found = exchange_muon(BASE.model.model_copy(update={"num_hidden_layers": matrices}), cluster)
    assert (found.padding > 0) == (padded > 0)


def test_more_ranks_send_more_padding_and_less_each() -> None:
    sent = [exchange_muon(BASE.model, Cluster(H200, nodes, 8, network(100e9))) for nodes in (1, 2, 4, 8)]
    shares = [each.padding / each.sent for each in sent]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] > 0.5
    assert exchange_gradients(BASE.model, alone(H200)).sent == exchange_muon(BASE.model, alone(H200)).sent == 0


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
