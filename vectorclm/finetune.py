"""Instruction tuning: the base model trained on packed conversations, with a share of pretraining text or without."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import Field

from vectorclm.errors import ConfigError
from vectorclm.model import CausalLM
from vectorclm.shards.order import MIX_BLOCK, MixturePhase, TrainingOrder
from vectorclm.shards.reader import ShardReader, open_shards
from vectorclm.store.artifact import Artifact
from vectorclm.train import TrainConfig, TrainingRun, own_share, train

logger = logging.getLogger(__name__)


class FinetuneConfig(TrainConfig):
    """Instruction tuning of the base model."""

    epochs: float = Field(gt=0, description="How often the conversations are read")
    replay: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=lambda share: share == 0,
        description="Share of the windows that is pretraining text once more, against forgetting it",
    )


def finetune(
    config: FinetuneConfig,
    base: Path,
    chat_shards: Artifact,
    token_lengths: Sequence[int],
    seed: int,
    work: TrainingRun,
    texts: tuple[Artifact, Mapping[str, float]] | None = None,
) -> tuple[CausalLM, dict[str, Any]]:
    """Train the base model on the packed conversations; the loop is pretraining's.

    `texts` are the shards of pretraining and the weights of their sources, for the share `config.replay` of all
    windows; their held-out windows are validated on, too. The conversations are read as often as without them. Raises
    ConfigError where they are fewer than one step takes.
    """
    with ExitStack() as stack:

        def opened(split: str) -> dict[str, ShardReader]:
            artifacts = [chat_shards, *(texts[:1] if texts is not None else [])]
            parts = [open_shards(artifact, split, cache=work.runtime.block_cache) for artifact in artifacts]
            return {label: reader for part in parts for label, reader in stack.enter_context(part).items()}

        training, validation = opened("train"), opened("validation")
        replayed = replay_weights(config.replay, texts[1]) if texts is not None else {}
        chats = {label: len(reader) for label, reader in training.items() if reader.has_mask}
        windows, share = sum(chats.values()), 1 - config.replay
        weights = {**{label: share * size / windows for label, size in chats.items()}, **replayed}
        sizes = {label: len(training[label]) for label in weights}
        phase = MixturePhase(round(config.epochs * windows / share), weights)
        per_block = next(iter(training.values())).block_windows
        plan = TrainingOrder([phase], sizes, seed, windows_per_block=per_block)
        dataset = own_share(training, plan, config, work.group)
        if dataset.steps == 0:
            raise ConfigError(
                f"{windows} windows of conversations make no step of finetune.batch_size {config.batch_size}"
            )
        model = CausalLM.from_pretrained(base)
        summary = train(model, config, dataset, validation, token_lengths, seed, work)
        if len(sizes) > 1:
            epochs = plan.epochs(dataset.steps * config.batch_size)
            summary["epochs"] = {label: round(value, 3) for label, value in epochs.items()}
        return model, summary


def replay_weights(share: float, weights: Mapping[str, float]) -> dict[str, float]:
    """The part of each source of text in a tuning that reads `share` of it again; too small ones are told and left."""
    if not share:
        return {}
    total = sum(weights.values())
    found = {label: share * weight / total for label, weight in weights.items() if weight}
    small = sorted(label for label, part in found.items() if part * MIX_BLOCK < 1)
    if len(small) == len(found):
        raise ConfigError(f"finetune.replay {share} leaves each source less than 1/{MIX_BLOCK}: give it more, or 0")
    if not small:
        return found
    logger.warning("finetune.replay leaves out %s, of less than 1/%d each", ", ".join(small), MIX_BLOCK)
    return replay_weights(share, {label: weights[label] for label in found if label not in small})
