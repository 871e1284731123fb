"""The training order is a pure function: an exact mix, no early repeat, blocks read once, whatever a source's end."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.conftest import publish_shards
from tests.test_model import CONFIG
from vectorclm.bench.data import walk
from vectorclm.config import load_experiment
from vectorclm.errors import ConfigError, DataError
from vectorclm.pretrain import pretrain
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.config import MIX_BLOCK, WhenExhausted
from vectorclm.shards.order import (
    GROUP_BLOCKS,
    MixturePhase,
    TrainingOrder,
    format_epochs,
    key_of,
    permute,
    windows_per_block,
)
from vectorclm.store.artifact import StageSpec as ArtifactPlan
from vectorclm.store.artifact import Store
from vectorclm.train import TrainingRun
from vectorclm.train_config import Phase, PretrainConfig
from vectorclm.training.checkpoint import Checkpoints
from vectorclm.training.optimizers import OptimizerConfig

SIZES = {"a": 3000, "b": 900}


def order_of(*phases: MixturePhase, sizes: dict[str, int] = SIZES, seed: int = 7, per_block: int = 8) -> TrainingOrder:
    return TrainingOrder(phases, sizes, seed, windows_per_block=per_block)


def mixture_error(order: TrainingOrder, sources: NDArray[np.int8]) -> tuple[float, float]:
    """How far counts stray from exact shares at any boundary: within a phase's segment, and since the beginning."""
    within = since = 0.0
    counts, wanted, first = np.zeros(len(order.labels)), np.zeros(len(order.labels)), 0
    shares = {segment.first: segment.shares for segment in order.segments}
    share, before, exact = shares[0], counts, wanted
    for end in order.boundaries():
        if first in shares:
            share, before, exact = shares[first], counts, wanted
        counts = counts + np.bincount(sources[first:end], minlength=len(order.labels))
        wanted = wanted + share * (end - first)
        within = max(within, np.abs(counts - before - (wanted - exact)).max())
        since, first = max(since, np.abs(counts - wanted).max()), int(end)
    assert first == order.windows
    return within, since


def early_repeats(order: TrainingOrder, sources: NDArray[np.int8], windows: NDArray[np.int32]) -> int:
    """Windows that come again before their source was read to its end."""
    repeats = 0
    for number, size in enumerate(order.sizes):
        seen = windows[sources == number]
        assert seen.max(initial=0) < size
        for start in range(0, len(seen), size):
            repeats += int((np.bincount(seen[start : start + size]) > 1).sum())
    return repeats


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000, 4097, 65_537])
def test_permute_is_a_permutation_that_depends_on_its_key(size: int) -> None:
    first = permute(np.arange(size), size, key_of(1))
    assert sorted(first) == list(range(size))
    if size > 100:
        assert (first != permute(np.arange(size), size, key_of(2))).mean() > 0.9
        assert (first != np.arange(size)).mean() > 0.9


def test_many_permutations_are_asked_at_once() -> None:
    sizes, number = np.array([5, 1000, 70_000]), np.repeat(np.arange(3), [5, 1000, 70_000])
    index = np.concatenate([np.arange(size) for size in sizes])
    keys = np.concatenate([key_of(9, one) for one in range(3)])
    together = permute(index, sizes[number], keys[number])
    for one, size in enumerate(sizes):
        assert np.array_equal(together[number == one], permute(np.arange(size), int(size), key_of(9, one)))


def test_a_permutation_has_no_pattern() -> None:
    """Each value is as likely at each place: chi-squared of 8 x 8 cells over 4,000 orders, near its 49 (sd 9.9)."""
    orders = np.stack([permute(np.arange(8), 8, key_of(3, number)) for number in range(4000)])
    cells = np.stack([np.bincount(orders[:, place], minlength=8) for place in range(8)])
    assert ((cells - 500) ** 2 / 500).sum() < 90
    far = permute(np.arange(100_000), 100_000, key_of(3)).astype(float)
    assert abs(np.corrcoef(far[:-1], far[1:])[0, 1]) < 0.01


def test_the_mix_is_exact_and_counters_go_on_across_phases() -> None:
    order = order_of(MixturePhase(2 * MIX_BLOCK, {"a": 0.75, "b": 0.25}), MixturePhase(MIX_BLOCK, {"a": 0.5, "b": 0.5}))
    source, window = order.locate(np.arange(order.windows))
    for block, share in enumerate([0.75, 0.75, 0.5]):
        assert (source[block * MIX_BLOCK : (block + 1) * MIX_BLOCK] == 0).sum() == share * MIX_BLOCK
    assert order.read_before(order.windows) == {"a": 2048, "b": 1024}
    assert order.epochs() == {"a": 2048 / 3000, "b": 1024 / 900}
    assert format_epochs(order.epochs()) == "a 0.68 epochs, b 1.14"
    seen = Counter(zip(source.tolist(), window.tolist(), strict=True))
    assert max(seen[0, i] for i in range(3000)) == 1  # not exhausted: nothing twice
    assert Counter(seen[1, i] for i in range(900)) == {1: 776, 2: 124}  # all of it before any of it again
    assert sorted(window[source == 1][:900]) == list(range(900))
    for place in (0, 1, 1000, 1024, 2048, 2500, 3072):
        assert list(order.read_before(place).values()) == np.bincount(source[:place], minlength=2).tolist()


def test_another_epoch_has_another_order() -> None:
    _, window = order_of(MixturePhase(1800, {"b": 1.0})).locate(np.arange(1800))
    assert sorted(window[:900]) == sorted(window[900:])
    assert (window[:900] != window[900:]).mean() > 0.9


def test_any_place_is_the_same_alone_as_in_a_range() -> None:
    order = order_of(MixturePhase(1500, {"a": 0.9, "b": 0.1}), MixturePhase(1500, {"a": 0.2, "b": 0.8}), seed=3)
    together = np.stack(order.locate(np.arange(3000)))
    for place in (0, 475, 476, 1023, 1499, 1500, 2523, 2999):
        assert np.array_equal(np.stack(order.locate(np.array([place])))[:, 0], together[:, place])


@pytest.mark.parametrize("when", ["repeat", "renormalise"])
@pytest.mark.parametrize("seed", range(15))
def test_the_mix_of_any_plan_is_exact(when: WhenExhausted, seed: int) -> None:
    """Plans drawn at random: each source less than a window from its share, of a phase and of all, at any boundary."""
    generator = np.random.default_rng(seed)
    labels = "abcdefgh"[: generator.integers(2, 9)]
    sizes = {label: int(generator.integers(1, 6000)) for label in labels}
    phases = []
    for _ in range(3):
        weights = {label: float(generator.exponential() + 0.02) for label in labels if generator.random() < 0.8}
        weights = weights or {labels[0]: 1.0}
        most = sum(sizes[label] for label in weights) // 4 if when == "renormalise" else 6000
        phases.append(MixturePhase(int(generator.integers(1, max(2, most))), weights, when))
    try:
        order = order_of(*phases, sizes=sizes)
    except ConfigError as error:
        assert "its sources have only" in str(error)
        return
    sources, windows = walk(order)
    within, since = mixture_error(order, sources)
    assert within < 1 and since < 1
    assert early_repeats(order, sources, windows) == 0
    assert np.diff(order.boundaries(), prepend=0).max() <= MIX_BLOCK
    if when == "renormalise":
        assert max(order.epochs().values()) <= 1


def test_a_plan_of_billions_of_tokens_is_walked_to_its_end() -> None:
    """The 3.5 billion tokens of `base`: the mix at all boundaries, each use counted, places alone as in the walk."""
    experiment, _ = load_experiment("base")
    length = experiment.shards.sequence_length
    weights = {source.label: source.weight for source in experiment.sample.sources}
    total = experiment.pretrain.tokens // length
    sizes = {label: round(total * weight / sum(weights.values())) for label, weight in weights.items()}
    order = experiment.pretrain.order(weights, sizes, length, 2, seed=1)
    assert order.windows == 3_417_967 and order.windows_per_block == 512
    sources, windows = walk(order)
    within, since = mixture_error(order, sources)
    assert within < 1 and since < 1
    assert early_repeats(order, sources, windows) == 0
    for number, label in enumerate(order.labels):
        assert order.epochs()[label] == (sources == number).sum() / sizes[label]
    places = np.arange(1000, order.windows, 34_567)
    source, window = order.locate(places)
    assert np.array_equal(source, sources[places]) and np.array_equal(window, windows[places])


@pytest.mark.parametrize("size", [1, 7, 8, 127, 128, 129, 900, 1024])
def test_a_reader_of_blocks_uses_every_window_once(size: int) -> None:
    """Group by group, the blocks fetched hold just the windows that are read meanwhile; short ends included."""
    order = order_of(MixturePhase(3 * size, {"x": 1.0}), sizes={"x": size})
    _, window = order.locate(np.arange(3 * size))
    groups = -(-size // (8 * GROUP_BLOCKS))
    read, orders = 0, []
    for epoch in range(3):
        blocks = [order.blocks(0, epoch, group) for group in range(groups)]
        orders.append(np.concatenate(blocks).tolist())
        assert sorted(orders[-1]) == list(range(-(-size // 8)))
        for of_group in blocks:
            assert 0 < len(of_group) <= GROUP_BLOCKS
            held = [w for block in of_group for w in order.block_windows(0, int(block))]
            assert sorted(held) == sorted(window[read : read + len(held)])
            read += len(held)
    assert read == 3 * size
    assert size < 128 or orders[0] != orders[1]


@pytest.mark.parametrize("start", [0, 1, 1000, 2500, 4999])
def test_groups_come_in_the_order_in_which_they_are_needed(start: int) -> None:
    order = order_of(
        MixturePhase(2000, {"a": 0.5, "b": 0.5}),
        MixturePhase(1000, {"a": 1.0}),
        MixturePhase(2000, {"a": 0.1, "b": 0.9}),
    )
    source, window = order.locate(np.arange(start, order.windows))
    groups = list(order.groups(start))
    assert [group.place for group in groups] == sorted({group.place for group in groups})
    held: dict[int, set[int]] = {}
    waiting = list(groups)
    for place, s, w in zip(range(start, order.windows), source, window, strict=True):
        if waiting and waiting[0].place == place:
            group = waiting.pop(0)
            held[group.source] = {w for block in group.blocks for w in order.block_windows(group.source, int(block))}
        assert w in held[s]  # so one group of each source is enough
    assert not waiting
    if start == 0:  # and each is named once
        assert len({group[:3] for group in groups}) == len(groups)


def test_a_source_that_runs_out_stops_the_plan() -> None:
    half = {"a": 0.5, "b": 0.5}
    order_of(MixturePhase(1800, half, "stop"))
    with pytest.raises(ConfigError, match=r"phase 1 takes 901 windows of b, which has 900 left of 900: sample more"):
        order_of(MixturePhase(1802, half, "stop"))
    with pytest.raises(ConfigError, match=r"phase 2 takes 300 windows of b, which has 100 left of 900"):
        order_of(MixturePhase(1600, half), MixturePhase(600, half, "stop"))
    with pytest.raises(ConfigError, match=r"2,000 windows of b, which has 0 left of 900"):
        order_of(MixturePhase(2000, half, "repeat"), MixturePhase(2000, {"b": 1}, "stop"))
    with pytest.raises(ConfigError, match=r"phase 1 takes 4,000 windows of a, .* and 4,000 windows of b"):
        order_of(MixturePhase(8000, half, "stop"))


def test_the_share_of_an_exhausted_source_goes_to_the_others_by_weight() -> None:
    sizes = {"a": 3000, "b": 900, "c": 3000}
    phase = MixturePhase(5000, {"a": 0.4, "b": 0.4, "c": 0.2}, "renormalise")
    order = order_of(phase, sizes=sizes)
    source, window = order.locate(np.arange(5000))
    last = int(np.flatnonzero(source == 1)[-1])
    assert 2200 < last <= 2253  # 900 / 0.4, and every one of them was used
    assert sorted(window[source == 1]) == list(range(900))
    rest = np.bincount(source[2300:5000], minlength=3)
    assert rest[0] / rest[2] == pytest.approx(2, abs=0.03)
    assert format_epochs(order.epochs()) == "a 0.91 epochs, b 1.00, c 0.46"
    exact = {"a": 900 + 2750 * 2 / 3, "b": 900.0, "c": 450 + 2750 / 3}
    for label, count in order.read_before(5000).items():
        assert abs(count - exact[label]) <= 1
    with pytest.raises(ConfigError, match=r"phase 2 takes 2,000 windows, but its sources have only 1,900 left"):
        order_of(phase, MixturePhase(2000, phase.weights, "renormalise"), sizes=sizes)


def test_the_config_of_a_phase_says_what_to_do() -> None:
    experiment, _ = load_experiment("tiny")
    values = experiment.pretrain.model_dump()
    assert [phase["when_exhausted"] for phase in values["phases"]] == ["repeat", "repeat"]
    values["phases"][1]["when_exhausted"] = "stop"
    config = PretrainConfig.model_validate(values)
    sizes = {"stories": 5000, "lessons": 3000}
    with pytest.raises(ConfigError, match="phase 2 takes 1,914 windows of lessons, which has 1,477 left of 3,000"):
        config.order({}, sizes, 128, 2, seed=1)
    values["phases"][1]["when_exhausted"] = "renormalise"
    assert PretrainConfig.model_validate(values).order({}, sizes, 128, 2, seed=1).epochs()["lessons"] == 1


def test_a_digest_is_of_all_that_orders_the_windows() -> None:
    def digest(
        phases: tuple[MixturePhase, ...] = (MixturePhase(100, {"a": 1, "b": 2}),),
        sizes: dict[str, int] = SIZES,
        seed: int = 7,
        per_block: int = 8,
        batch_size: int = 4,
    ) -> str:
        return order_of(*phases, sizes=sizes, seed=seed, per_block=per_block).digest(batch_size)

    others = [
        digest(phases=(MixturePhase(101, {"a": 1, "b": 2}),)),
        digest(phases=(MixturePhase(100, {"a": 2, "b": 2}),)),
        digest(phases=(MixturePhase(100, {"a": 1, "b": 2}, "stop"),)),
        digest(sizes={"a": 3000, "b": 901}),
        digest(seed=8),
        digest(per_block=9),
        digest(batch_size=5),
    ]
    assert digest() == digest(phases=(MixturePhase(100, {"b": 2, "a": 1}),)) and len({digest(), *others}) == 8


def test_the_order_is_pinned() -> None:
    """Where this fails, raise ORDER, and VERSIONS of both trainings: a resume must not go on in another order."""
    order = order_of(MixturePhase(1500, {"a": 0.9, "b": 0.1}), MixturePhase(1500, {"a": 0.2, "b": 0.8}))
    source, window = order.locate(np.array([0, 1, 2, 1499, 1500, 2999]))
    assert (source.tolist(), window.tolist()) == ([0, 0, 1, 0, 0, 1], [444, 1046, 505, 522, 726, 13])


def test_a_training_resumes_on_no_other_order_and_no_other_data(tmp_path: Path) -> None:
    """What a killed run left: its checkpoint of step 2. It goes on as before, or not at all."""
    ids = np.random.default_rng(0).integers(5, CONFIG.vocab_size, (40, 16), np.uint16)
    sources = {"a": {"input_ids": ids[:32]}, "a/validation": {"input_ids": ids[32:]}}
    shards = publish_shards(str(tmp_path), tmp_path / "work", sources, 4096)
    config = PretrainConfig(
        batch_size=8,
        optimizer=OptimizerConfig(learning_rate=0.01, adamw_learning_rate=0.01),
        validation_interval=100,
        phases=[Phase(tokens=3 * 8 * 16)],
    )
    store, fingerprint = Store(str(tmp_path)), ArtifactPlan("pretrain", 1, {}, {})

    def losses(changes: Mapping[str, object] = {}, data: str = "shards of today", seed: int = 1) -> list[float]:
        runtime = Runtime(device="cpu", threads=1, checkpoint_interval=2)
        with Checkpoints(store, fingerprint, tmp_path / "work", data) as checkpoints:
            work = TrainingRun("pretrain", seed, tmp_path, checkpoints, runtime)
            changed = PretrainConfig.model_validate(config.model_dump() | changes)
            pretrain(CONFIG, changed, {"a": 1.0}, shards, [1] * CONFIG.vocab_size, work)
        lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    whole = losses()
    assert len(whole) == 3 and losses() == whole  # the second time from step 2 on
    for changes in ({"phases": [{"tokens": 4 * 8 * 16}]}, {"batch_size": 4}):
        with pytest.raises(DataError, match=r"step-00000002-\w{8} was trained on the training order \w{12}…"):
            losses(changes)
    with pytest.raises(DataError, match="the training order"):
        losses(seed=2)
    with pytest.raises(DataError, match=r"the data set shards of to…, which is now shards of ye…: restore the old"):
        losses(data="shards of yesterday")
    assert losses() == whole


def test_a_weight_of_no_source_or_too_small_is_named() -> None:
    with pytest.raises(ConfigError, match="phase 1 weighs c, but the sources are a, b"):
        order_of(MixturePhase(10, {"c": 1.0}))
    with pytest.raises(ConfigError, match="phase 1: b has less than 1/1024 of it"):
        order_of(MixturePhase(10, {"a": 1.0, "b": 0.0009}))


def test_a_block_is_a_mebibyte() -> None:
    assert windows_per_block(1024, 2) == 512 and windows_per_block(1024, 4) == 256
    assert windows_per_block(1000, 2) == 524 and windows_per_block(65_536, 4) == 4 and windows_per_block(2**20, 2) == 1
