"""The optimizers of a model: one for the hidden matrices, AdamW for embeddings and norms."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

from vectorclm.nn.layers import StackedLinear
from vectorclm.runtime.group import ALONE, Group
from vectorclm.training.config import MatrixOptimizer, OptimizerConfig
from vectorclm.training.muon import Muon, WeightDecay


def _adamw(
    params: Sequence[nn.Parameter], config: OptimizerConfig, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(params, learning_rate, betas, eps=1e-10, weight_decay=weight_decay, fused=True)


def _adamw_of_matrices(
    params: Sequence[nn.Parameter], config: OptimizerConfig, model: nn.Module, group: Group
) -> torch.optim.Optimizer:
    return _adamw(params, config, config.learning_rate, config.weight_decay)


def _muon_of_matrices(
    params: Sequence[nn.Parameter], config: OptimizerConfig, model: nn.Module, group: Group
) -> torch.optim.Optimizer:
    stacked = {m.weight: list(m.rows.values()) for m in model.modules() if isinstance(m, StackedLinear)}
    weight_decay = WeightDecay(config.weight_decay, config.cautious_weight_decay)
    return Muon(params, config.learning_rate, config.momentum, weight_decay, group, stacked)


# Builds the optimizer of the hidden matrices from the matrices, the settings, the model, and the group of ranks.
MATRIX_OPTIMIZERS: Mapping[
    MatrixOptimizer, Callable[[Sequence[nn.Parameter], OptimizerConfig, nn.Module, Group], torch.optim.Optimizer]
] = {
    "muon": _muon_of_matrices,
    "adamw": _adamw_of_matrices,
}


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, group: Group = ALONE
) -> tuple[torch.optim.Optimizer, torch.optim.AdamW]:
    """`config.matrices` over the weights of the decoder layers' projections; AdamW over all other parameters.

    The others are embeddings, norms, and whatever a layer adds: a table of biases is no matrix product.
    """
    projections = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (hidden if id(p) in projections and ".layers." in name else rest).append(p)
    matrices = MATRIX_OPTIMIZERS[config.matrices](hidden, config, model, group)
    return matrices, _adamw(rest, config, config.adamw_learning_rate, 0.0)


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Set every parameter group's learning rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * factor
