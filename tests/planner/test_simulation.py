"""The simulation counts what the training's own streams read, on any number of ranks, in seconds of one core."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from tests.conftest import publish_shards
from vectorclm.config import load_experiment
from vectorclm.dataset import StreamingLanguageModelDataset
from vectorclm.memory_plan import TrainingShape, checkpoint_bytes
from vectorclm.planner.hardware import DEVICES, network
from vectorclm.planner.simulation import LIMITS, RANKS, Simulation, interruption_loss
from vectorclm.runtime.group import Group
from vectorclm.shards.block_readers import MmapBlockReader
from vectorclm.shards.blocks import Shard
from vectorclm.shards.reader import open_shards
from vectorclm.shards.writer import Windows

BASE = load_experiment("base")[0]
PAGE = (Path(__file__).parents[2] / "vectorclm" / "planner" / "README.md").read_text(encoding="utf-8")


class BegunBlocks(MmapBlockReader):
    """Counts the windows of the blocks that a reader begins to read."""

    windows = 0

    def begin(self, shard: Shard, block: int) -> Callable[[], Windows]:
        first, last = shard.span(shard.columns[0], block)
        self.windows += (last - first) // (shard.sequence_length * shard.columns[0].dtype.itemsize)
        return super().begin(shard, block)


def small(batch: int = 16) -> Simulation:
    """Two sources of 8,000 windows in all, of 1,024 tokens."""
    values = BASE.model_dump(exclude_none=True)
    values["sample"] |= {"bytes": 8_000 * 1024 * 4, "sources": values["sample"]["sources"][:2]}
    values["pretrain"] |= {"batch_size": batch, "phases": [{"tokens": 6_000 * 1024}]}
    values["tokenizer"]["vocab_size"] = values["model"]["vocab_size"]
    return Simulation(type(BASE).model_validate(values), DEVICES["h200"], 8, network(100e9))


@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (4, 3), (24, 15), (24, 20)])
def test_a_rank_reads_what_the_training_reads(ranks: int, rank: int, tmp_path: Path) -> None:
    simulation = small()
    sizes = dict(zip(simulation.order.labels, simulation.order.sizes, strict=True))
    sources = {label: {"input_ids": np.zeros((size, 1024), np.uint16)} for label, size in sizes.items()}
    artifact = publish_shards(str(tmp_path / "store"), tmp_path / "work", sources, 2**30)
    with open_shards(artifact, "train") as readers:
        counting = BegunBlocks()
        for reader in readers.values():
            reader.source = counting
        stream = StreamingLanguageModelDataset(readers, simulation.order, simulation.batch, Group(rank, ranks))
        stream.start_step = simulation.resumed_step
        batches = iter(stream)
        first = next(batches)
        begun = counting.windows
        expected = len(range(rank, simulation.batch, ranks))
        assert len(first.input_ids) == expected
        planned = simulation._windows_at_resume(np.arange(simulation.batch)[rank::ranks]) if expected else 0
        assert begun == planned
        del batches
        if rank:
            return
        stream.start_step = counting.windows = 0
        for _ in stream:
            pass
    assert simulation.fetched == counting.windows * simulation.window_bytes


def test_counts_of_ranks_add_up() -> None:
    simulation = small()
    one, four, eight, many = (simulation.at(ranks) for ranks in (1, 4, 8, 32))
    assert (one.most_windows, four.most_windows, many.most_windows) == (16, 4, 1)
    assert (one.idle_ranks, many.idle_ranks) == (0, 16) and many.waiting == 0.5 and four.waiting == 0
    assert one.fetched_bytes == eight.fetched_bytes  # once a node
    assert many.fetched_bytes == 2 * one.fetched_bytes  # two of its four nodes have rows
    assert one.fetched_bytes >= one.used_bytes > 0.6 * one.fetched_bytes
    checkpoint = checkpoint_bytes(TrainingShape(BASE.model, 1024))
    assert one.resume_bytes <= four.resume_bytes == eight.resume_bytes
    assert many.resume_bytes - checkpoint == pytest.approx(2 * (one.resume_bytes - checkpoint), rel=0.1)
    assert simulation.at(3).waiting == pytest.approx(1 - 16 / 18)
    assert one.muon_waiting == many.muon_waiting == 0 < simulation.at(3).muon_waiting  # 16 or 32 matrices of a shape


def test_interruptions_cost_more_with_more_ranks_and_longer_intervals() -> None:
    losses = [interruption_loss(1.0, 100_000, ranks, 60.0) for ranks in (8, 512, 4096, 32_768)]
    assert losses == sorted(losses) and losses[0] < 0.001 and losses[-1] > 0.08
    mean = 50_676 * 3600 / 4096
    assert losses[2] == pytest.approx((60 + 500) / mean, rel=0.15)  # a restart and half of 1,000 steps
    assert interruption_loss(1.0, 100_000, 4096, 600.0) > losses[2]
    assert interruption_loss(1.0, 2_000, 4096, 60.0) < losses[2]  # checkpoints every 100 steps


def test_4096_ranks_take_seconds_of_one_core_and_the_page_has_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.process_time()
    assert main(["simulate", "base", "--json"]) == 0
    assert time.process_time() - began < 30
    found = json.loads(capsys.readouterr().out)
    assert [each["ranks"] for each in found["ranks"]] == list(RANKS) and RANKS[-1] == 4096
    assert set(LIMITS) < set(found["limits"])
    for name, ranks in found["limits"].items():
        assert f"| {name} | {'not up to 4,096' if ranks is None else f'{ranks:,}'} |" in PAGE
    for each in found["ranks"]:
        assert (
            f"| {each['ranks']:,} | {each['most_windows']} | {each['waiting']:.0%} | {each['muon_waiting']:.0%} | "
            f"{1e3 * each['step_seconds']:,.1f} | {each['read_bytes_per_second'] / 1e6:,.0f} | "
            f"{each['fetched_bytes'] / 1e9:,.1f} | {each['resume_bytes'] / 1e9:,.1f} | {each['lost']:.2%} |"
        ) in PAGE
