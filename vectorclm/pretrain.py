"""Pretraining: a new model trained over phases with token budgets and data mixes."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vectorclm.errors import ConfigError
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.shards.order import format_epochs
from vectorclm.shards.reader import open_shards
from vectorclm.store.artifact import Artifact
from vectorclm.train import TrainingRun, own_share, train
from vectorclm.train_config import PretrainConfig

logger = logging.getLogger(__name__)


def pretrain(
    model_config: ModelConfig,
    config: PretrainConfig,
    sample_weights: Mapping[str, float],
    shards: Artifact,
    token_lengths: Sequence[int],
    run: TrainingRun,
) -> tuple[CausalLM, dict[str, Any]]:
    """Pretrain a new model over all phases; return the model and the training's summary.

    A phase without weights uses `sample_weights`. Raises ConfigError where all phases are shorter than one step, or a
    source runs out in a phase that forbids it.
    """
    cache = run.runtime.block_cache
    with (
        run.node_blocks(shards, config) as node,
        open_shards(shards, "train", cache=cache, node=node) as training,
        open_shards(shards, "validation", cache=cache, node=node and node.keeping()) as validation,
    ):
        sizes = {label: len(reader) for label, reader in training.items()}
        any_source = next(iter(training.values()))
        order = config.order(sample_weights, sizes, any_source.sequence_length, any_source.token_bytes, run.seed)
        dataset = own_share(training, order, config, run.group)
        if dataset.steps == 0:
            step = config.batch_size * any_source.sequence_length
            raise ConfigError(f"pretrain.phases hold {config.tokens} tokens, fewer than one step ({step}): raise them")
        epochs = order.epochs(dataset.steps * config.batch_size)
        logger.info("pretrain reads %s", format_epochs(epochs))
        torch.manual_seed(run.seed)
        model = CausalLM(model_config)
        if config.zero_output_projections:
            model.zero_output_projections()
        summary = train(model, config, dataset, validation, token_lengths, run)
    rounded = {label: round(value, 3) for label, value in epochs.items()}
    read = {"epochs": rounded, "read": format_epochs(epochs)}
    return model, {**summary, **read, "parameters": model_config.parameters}
