"""`vectorclm bench quality` and `bench rates`: ablations of the optimizer, the schedule and the model's shape.

Every arm is a `pretrain` of the same shards, in the same order and from the same starting weights. The stage builds
it and the store keeps it, so a stopped bench resumes and a finished one only prints. The measure is the loss (nats a
token) on held-out windows at the end of each arm's schedule. Arms of `quality` use one thread, as more threads change
the order of sums. The models of `rates` are large and use the GPU.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vectorclm.bench.table import Row, could_not_run
from vectorclm.config import ExperimentConfig, changed, load_experiment
from vectorclm.errors import DivergedError
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import run_stage
from vectorclm.store.artifact import Store

logger = logging.getLogger(__name__)

TOKENS = 2**18  # budget of an arm
# A reduced `small`: all arms together take less than an hour of one core.
SETTING: Mapping[str, Any] = {
    "sample.bytes": 6_000_000,
    "sample.validation_share": 0.05,
    "tokenizer.vocab_size": 2048,
    "tokenizer.bytes": 4_000_000,
    "shards.sequence_length": 256,
    "chat.sequence_length": 256,
    "model.vocab_size": 2048,
    "model.hidden_size": 128,
    "model.intermediate_size": 352,
    "model.num_hidden_layers": 4,
    "model.num_attention_heads": 4,
    "model.num_key_value_heads": 2,
    "model.max_position_embeddings": 256,
    "pretrain.batch_size": 4,
    "pretrain.validation_interval": 1_000_000,  # only at the end
    "pretrain.validation_windows": 32,
}
RATES = {"muon": [0.008, 0.016, 0.032], "adamw": [0.002, 0.004, 0.008]}  # first rates of a search; a factor of 2 apart
MORE = 3  # further rates at most, while the best is the lowest or the highest
HALF = 0.5  # Muon's first share of the tokens; then THREE_QUARTERS if it needs more, else QUARTER
QUARTER, THREE_QUARTERS = 0.25, 0.75
ASK = 0.75  # bound on Muon's share of AdamW's tokens: the upper end in the literature
NUDGE = 1.01  # a negligible change of the learning rate: its change of the loss is noise
DECAYING, WEIGHT_DECAY = 0.4, 0.3
CLOSE = 2**0.5  # half the distance between two rates, as a factor
NOTHING: Mapping[str, Any] = {}
RATE, ADAMW_RATE = "pretrain.optimizer.learning_rate", "pretrain.optimizer.adamw_learning_rate"
NAMES = {RATE: "Muon's rate", ADAMW_RATE: "AdamW's rate, of embeddings and norms"}
# Short trainings of `base`: 400 steps of 32 windows, seconds on a GPU.
SHORT: Mapping[str, Any] = {
    "sample.validation_share": 0.02,
    "pretrain.batch_size": 32,
    "pretrain.phases": [{"tokens": 400 * 32 * 1024}],
    "pretrain.validation_interval": 1_000_000,
    "pretrain.samples": None,
}
SHORT_RATES = {RATE: [0.006, 0.012, 0.024], ADAMW_RATE: [0.006, 0.012, 0.024]}
TOKENS_EXPONENT = -0.32  # of the optimal rate: Bjorck et al., arXiv 2409.19913; for Muon, Ren et al., arXiv 2603.28743
BATCH_EXPONENT = 0.5  # Malladi et al., arXiv 2205.10287


@dataclass(frozen=True)
class Arms:
    """Trainings that each change some settings of one experiment; each is built once."""

    experiment: ExperimentConfig
    store: Store
    data: Path | None
    runtime: Runtime = Runtime(device="cpu", threads=1)

    def loss(self, changes: Mapping[str, Any], budget: float = 1.0) -> float:
        """Held-out loss (nats a token) after a share of the token budget, with sources weighted as in the sample.

        Infinite where the training diverged.
        """
        length = self.experiment.shards.sequence_length * self.experiment.pretrain.batch_size
        tokens = round(self.experiment.pretrain.tokens * budget / length) * length
        arm = changed(self.experiment, {**changes, "pretrain.phases": [{"tokens": tokens}]})
        try:
            for stage in ("sample", "tokenizer", "shards", "pretrain"):
                artifact, _ = run_stage(stage, arm, self.store, self.runtime, self.data)
        except DivergedError as error:
            logger.info("%s: %s", dict(changes), error)
            return math.inf
        weights = {source.label: source.weight for source in arm.sample.sources}
        scores = artifact.summary["validation"]
        loss = sum(weights[label] * scores[label]["loss"] for label in weights) / sum(weights.values())
        logger.info("%.4f nats a token: %s, %d tokens", loss, dict(changes), tokens)
        return float(loss)

    def tuned(self, key: str, start: Sequence[float], changes: Mapping[str, Any]) -> "Tuned":
        """Search the learning rate `key`: losses at the rates `start`, and further while the best is at an end."""
        losses = {rate: self.loss({**changes, **_rates(key, rate, changes)}) for rate in start}
        for _ in range(MORE):
            rates = sorted(losses)
            best = min(rates, key=losses.__getitem__)
            if best not in (rates[0], rates[-1]):
                break
            further = best / 2 if best == rates[0] else best * 2
            losses[further] = self.loss({**changes, **_rates(key, further, changes)})
        return Tuned({rate: losses[rate] for rate in sorted(losses)})


def _rates(key: str, rate: float, changes: Mapping[str, Any]) -> dict[str, float]:
    """The changed learning rates: AdamW for all parameters has a single rate."""
    alone = changes.get("pretrain.optimizer.matrices") == "adamw"
    return {RATE: rate, ADAMW_RATE: rate} if alone else {key: rate}


@dataclass(frozen=True)
class Tuned:
    """Losses by learning rate, from low to high."""

    losses: Mapping[float, float]

    @property
    def rate(self) -> float:
        """The best rate tried."""
        return min(self.losses, key=self.losses.__getitem__)

    @property
    def loss(self) -> float:
        """The best loss."""
        return self.losses[self.rate]

    @property
    def optimum(self) -> float | None:
        """The minimum of a parabola through the best rate and its neighbours, over the logarithm of the rate.

        None where the best rate is at an end, or the next higher rate diverged.
        """
        rates = list(self.losses)
        place = rates.index(self.rate)
        if place in (0, len(rates) - 1):
            return None
        here = rates[place - 1 : place + 2]
        if math.isinf(self.losses[here[-1]]):
            return None
        square, linear, _ = np.polyfit(np.log2(here), [self.losses[rate] for rate in here], 2)
        return float(2 ** (-linear / (2 * square)))

    def __str__(self) -> str:
        return ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in self.losses.items())


def setting(store: Store, data: Path | None, changes: Mapping[str, Any]) -> ExperimentConfig:
    """The arms' base experiment: `small` with SETTING on the mirror `data`, or `tiny` without a mirror."""
    experiment, path = load_experiment("tiny" if data is None else "small")
    ours = {"pretrain.phases": [{"tokens": TOKENS}], **({} if data is None else SETTING)}
    experiment = changed(experiment, {**ours, **changes})
    return pin(experiment, store.work_root(None) / path.name, data, resolve=True)[0]


def quality(store: Store, data: Path | None, changes: Mapping[str, Any] = NOTHING) -> Iterator[Row]:
    """Muon's share of AdamW's tokens, and each default against its alternative."""
    arms = Arms(setting(store, data, changes), store, data)
    muon = arms.tuned(RATE, RATES["muon"], {})
    everything = {"pretrain.optimizer.matrices": "adamw"}
    adamw = arms.tuned(RATE, RATES["adamw"], everything)
    apart = arms.loss({**everything, RATE: adamw.rate})  # embeddings and norms at their rate under Muon
    ours = {RATE: muon.rate}
    budgets = {1.0: muon.loss, HALF: arms.loss(ours, HALF)}
    other = QUARTER if budgets[HALF] <= min(adamw.loss, apart) else THREE_QUARTERS
    budgets[other] = arms.loss(ours, other)
    text = "the generated world" if data is None else "the mirror"
    yield _saved(f"tokens that Muon needs for AdamW's last loss, on {text}", arms, muon, adamw, apart, budgets)
    noise = abs(arms.loss({RATE: muon.rate * NUDGE}) - muon.loss)
    yield from _decisions(arms, ours, muon.loss, noise)


def _saved(name: str, arms: Arms, muon: Tuned, adamw: Tuned, apart: float, budgets: Mapping[float, float]) -> Row:
    """The budget where Muon reaches AdamW's loss, interpolated between two budgets over their logarithm."""
    goal, tokens, shares = min(adamw.loss, apart), arms.experiment.pretrain.tokens, sorted(budgets)
    note = f"Muon by rate {muon}; AdamW by rate {adamw}, at the best with Muon's rate of embeddings {apart:.4f}; "
    note += "Muon by budget " + ", ".join(f"{share:g}: {budgets[share]:.4f}" for share in shares)
    below = [place for place, share in enumerate(shares) if budgets[share] <= goal]
    if not below:
        return Row(name, None, tokens, None, "tokens", ASK, False, f"Muon does not reach it; {note}")
    share = shares[below[0]]
    if below[0] == 0:
        note = f"at most, as the shortest training is below it; {note}"
    else:
        less = shares[below[0] - 1]
        part = (budgets[less] - goal) / (budgets[less] - budgets[share])
        share = less * (share / less) ** part
    return Row(name, round(share * tokens), tokens, round(share, 4), "tokens", ASK, share <= ASK, note)


def _decisions(arms: Arms, ours: Mapping[str, Any], loss: float, noise: float) -> Iterator[Row]:
    """Each default's loss over its alternative's: the bound is 1 plus the noise."""

    def row(name: str, mine: float, other: float, what: str = "") -> Row:
        ask, ratio = 1 + noise / other, mine / other
        note = f"{mine - other:+.4f} nats; noise {noise:.4f}" + (f"; {what}" if what else "")
        return Row(
            name, round(mine, 4), round(other, 4), round(ratio, 4), "nats/token", round(ask, 4), ratio <= ask, note
        )

    kind = {"pretrain.schedule.kind": "warmup_stable_decay", "pretrain.schedule.decay": DECAYING}
    yield row(f"cosine against warmup-stable-decay, the last {DECAYING:g}", loss, arms.loss({**ours, **kind}))
    zero = arms.loss({**ours, "pretrain.zero_output_projections": True})
    yield row("small output projections against zero ones", loss, zero)
    decayed = {**ours, "pretrain.optimizer.weight_decay": WEIGHT_DECAY}
    yield row(f"no weight decay against {WEIGHT_DECAY:g}", loss, arms.loss(decayed))
    cautious = {**decayed, "pretrain.optimizer.cautious_weight_decay": True}
    yield row(f"no weight decay against cautious {WEIGHT_DECAY:g}", loss, arms.loss(cautious))
    heads = {size: arms.loss({**ours, **_heads(size)}) for size in (64, 128)}
    yield row(
        "heads of 64 against 128", heads[64], heads[128], "as many parameters; queries twice as wide as the model"
    )


def _heads(size: int, queries: int = 256) -> dict[str, int]:
    shape = {"head_dim": size, "num_attention_heads": queries // size, "num_key_value_heads": queries // size // 2}
    return {f"model.{name}": value for name, value in shape.items()}


def short_arms(store: Store, data: Path | None, target: str = "base", changes: Mapping[str, Any] = NOTHING) -> Arms:
    """Short trainings of the experiment `target`, with text from the mirror `data` or the hub."""
    experiment, path = load_experiment(target)
    experiment = changed(experiment, {**SHORT, **changes})
    pinned = pin(experiment, store.work_root(None) / path.name, data, resolve=True)[0]
    return Arms(pinned, store, data, Runtime())


def rates(store: Store, data: Path | None) -> Iterator[Row]:
    """The learning rates of `base` against rates scaled from short trainings; these need a GPU."""
    if torch.cuda.is_available():
        yield from rates_of(short_arms(store, data))
        return
    for name in NAMES.values():
        yield could_not_run(f"base: {name}", "rate", round(CLOSE, 3), "torch sees no GPU here")


def rates_of(arms: Arms) -> Iterator[Row]:
    """The learning rates of an experiment against rates scaled from short trainings of the same model.

    Muon's rate is searched first. The rate of embeddings and norms is searched at Muon's best rate. Each optimum is
    the parabola's minimum, scaled by the tokens to the power TOKENS_EXPONENT and the batch size to BATCH_EXPONENT.
    """
    target, short = load_experiment(arms.experiment.name)[0], arms.experiment.pretrain
    tokens, batches = target.pretrain.tokens / short.tokens, target.pretrain.batch_size / short.batch_size
    factor = tokens**TOKENS_EXPONENT * batches**BATCH_EXPONENT
    best: dict[str, float] = {}
    for key, name in NAMES.items():
        tuned = arms.tuned(key, SHORT_RATES[key], best)
        best[key], optimum = tuned.rate, tuned.optimum or tuned.rate
        there = optimum * factor
        ours = getattr(target.pretrain.optimizer, key.rpartition(".")[2])
        away = max(ours / there, there / ours)
        why = f"{factor:.3f} of the optimum {optimum:.4g} with {short.tokens:,} tokens: {tuned}"
        ask = round(CLOSE, 3)
        yield Row(f"{target.name}: {name}", ours, round(there, 5), round(away, 3), "rate", ask, away <= CLOSE, why)
