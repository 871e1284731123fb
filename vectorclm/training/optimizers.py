"""The optimizers of a model and their settings: one for the hidden matrices, AdamW for embeddings and norms.

Experiments are read without torch, so each function that uses it imports it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from vectorclm.runtime.group import ALONE, Group
from vectorclm.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

MatrixOptimizer = Literal["muon", "adamw"]


class OptimizerConfig(Settings):
    """The optimizers' settings.

    A setting that older experiments lack stays out of the fingerprint at its default value.
    """

    learning_rate: float = Field(gt=0, description="Peak learning rate of the hidden matrices")
    adamw_learning_rate: float = Field(gt=0, description="Peak learning rate of embeddings and norms, under AdamW")
    matrices: MatrixOptimizer = Field(
        default="muon",
        exclude_if=lambda value: value == "muon",
        description="Optimizer of the hidden matrices, at learning_rate",
    )
    momentum: float = Field(default=0.95, ge=0, lt=1, description="Nesterov momentum of Muon")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the gradient's mean")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="AdamW's decay of the squared gradient's mean")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Decoupled decay of the hidden matrices, per unit of learning rate"
    )
    cautious_weight_decay: bool = Field(
        default=False,
        exclude_if=lambda value: not value,
        description="Decay only the weights that the update moves towards zero as well; Muon only",
    )

    @model_validator(mode="after")
    def _muon_is_cautious(self) -> Self:
        if self.cautious_weight_decay and self.matrices != "muon":
            raise ValueError("cautious_weight_decay needs matrices = 'muon'")
        return self


def _adamw(
    params: "Sequence[nn.Parameter]", config: OptimizerConfig, learning_rate: float, weight_decay: float
) -> "torch.optim.AdamW":
    import torch

    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(params, learning_rate, betas, eps=1e-10, weight_decay=weight_decay, fused=True)


def _adamw_of_matrices(
    params: "Sequence[nn.Parameter]", config: OptimizerConfig, model: "nn.Module", group: Group
) -> "torch.optim.Optimizer":
    return _adamw(params, config, config.learning_rate, config.weight_decay)


def _muon_of_matrices(
    params: "Sequence[nn.Parameter]", config: OptimizerConfig, model: "nn.Module", group: Group
) -> "torch.optim.Optimizer":
    from vectorclm.nn.layers import StackedLinear
    from vectorclm.training.muon import Muon, WeightDecay

    stacked = {m.weight: list(m.rows.values()) for m in model.modules() if isinstance(m, StackedLinear)}
    weight_decay = WeightDecay(config.weight_decay, config.cautious_weight_decay)
    return Muon(params, config.learning_rate, config.momentum, weight_decay, group, stacked)


# Builds the optimizer of the hidden matrices from the matrices, the settings, the model, and the group of ranks.
MATRIX_OPTIMIZERS: Mapping[
    MatrixOptimizer, "Callable[[Sequence[nn.Parameter], OptimizerConfig, nn.Module, Group], torch.optim.Optimizer]"
] = {
    "muon": _muon_of_matrices,
    "adamw": _adamw_of_matrices,
}


def build_optimizers(
    model: "nn.Module", config: OptimizerConfig, group: Group = ALONE
) -> "tuple[torch.optim.Optimizer, torch.optim.AdamW]":
    """`config.matrices` over the weights of the decoder layers' projections; AdamW over all other parameters.

    The others are embeddings, norms, and whatever a layer adds: a table of biases is no matrix product.
    """
    from torch import nn

    projections = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (hidden if id(p) in projections and ".layers." in name else rest).append(p)
    matrices = MATRIX_OPTIMIZERS[config.matrices](hidden, config, model, group)
    return matrices, _adamw(rest, config, config.adamw_learning_rate, 0.0)


def set_learning_rates(optimizers: "Iterable[torch.optim.Optimizer]", factor: float) -> None:
    """Set every parameter group's learning rate to its peak times `factor`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * factor
