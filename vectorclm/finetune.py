"""Instruction fine-tuning: the base model trained on packed conversations, with or without pretraining text."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vectorclm.errors import ConfigError
from vectorclm.model import CausalLM
from vectorclm.shards.config import MIX_BLOCK
from vectorclm.shards.order import MixturePhase, TrainingOrder
from vectorclm.shards.reader import ShardReader, open_shards
from vectorclm.store.artifact import Artifact
from vectorclm.train import TrainingRun, own_share, train
from vectorclm.train_config import FinetuneConfig, check_conversations

logger = logging.getLogger(__name__)


def finetune(
    config: FinetuneConfig,
    base: Path,
    chat_shards: Artifact,
    token_lengths: Sequence[int],
    run: TrainingRun,
    texts: tuple[Artifact, Mapping[str, float]] | None = None,
) -> tuple[CausalLM, dict[str, Any]]:
    """Fine-tune the base model on packed conversations; return the model and the training's summary.

    `texts` are the shards of pretraining and the weights of their sources. They fill the share `config.replay` of all
    windows, and their held-out windows are part of the validation. Replayed text does not change how often the
    conversations are read. Raises ConfigError where the conversations do not fill one step.
    """
    with ExitStack() as stack:
        node = stack.enter_context(run.node_blocks(chat_shards, config))

        def open_split(split: str) -> dict[str, ShardReader]:
            artifacts = [chat_shards, *(texts[:1] if texts is not None else [])]
            shared, cache = node if split == "train" else node and node.keeping(), run.runtime.block_cache
            parts = [open_shards(artifact, split, cache=cache, node=shared) for artifact in artifacts]
            return {label: reader for part in parts for label, reader in stack.enter_context(part).items()}

        training, validation = open_split("train"), open_split("validation")
        replayed = replay_weights(config.replay, texts[1]) if texts is not None else {}
        chats = {label: len(reader) for label, reader in training.items() if reader.has_mask}
        windows, share = sum(chats.values()), 1 - config.replay
        check_conversations(config, windows)
        weights = {**{label: share * size / windows for label, size in chats.items()}, **replayed}
        sizes = {label: len(training[label]) for label in weights}
        phase = MixturePhase(round(config.epochs * windows / share), weights)
        per_block = next(iter(training.values())).block_windows
        order = TrainingOrder([phase], sizes, run.seed, windows_per_block=per_block)
        dataset = own_share(training, order, config, run.group)
        model = CausalLM.from_pretrained(base)
        summary = train(model, config, dataset, validation, token_lengths, run)
        if len(sizes) > 1:
            epochs = order.epochs(dataset.steps * config.batch_size)
            summary["epochs"] = {label: round(value, 3) for label, value in epochs.items()}
        return model, summary


def replay_weights(share: float, weights: Mapping[str, float]) -> dict[str, float]:
    """Split the share of replayed pretraining text among its sources by their weights.

    Sources too small for the mix are left out, with a warning. Raises ConfigError where all of them are too small.
    """
    if not share:
        return {}
    total = sum(weights.values())
    found = {label: share * weight / total for label, weight in weights.items() if weight}
    small = sorted(label for label, part in found.items() if part * MIX_BLOCK < 1)
    if len(small) == len(found):
        raise ConfigError(
            f"finetune.replay {share} leaves each source less than 1/{MIX_BLOCK} of all windows: raise it, or set 0"
        )
    if not small:
        return found
    logger.warning("finetune.replay leaves out %s, of less than 1/%d each", ", ".join(small), MIX_BLOCK)
    return replay_weights(share, {label: weights[label] for label in found if label not in small})
