"""Settings of the optimizers of a model."""

from typing import Literal, Self

from pydantic import Field, model_validator

from vectorclm.settings import Settings

MatrixOptimizer = Literal["muon", "adamw"]


class OptimizerConfig(Settings):
    """The optimizers' settings.

    A setting that older experiments lack stays out of the fingerprint at its default value.
    """

    learning_rate: float = Field(gt=0, description="Peak learning rate of the hidden matrices")
    adamw_learning_rate: float = Field(gt=0, description="Peak learning rate of embeddings and norms, under AdamW")
    matrices: MatrixOptimizer = Field(
        "muon",
        exclude_if=lambda value: value == "muon",
        description="Optimizer of the hidden matrices, at learning_rate",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Nesterov momentum of Muon")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's decay of the gradient's mean")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's decay of the squared gradient's mean")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled decay of the hidden matrices, per unit of learning rate"
    )
    cautious_weight_decay: bool = Field(
        False,
        exclude_if=lambda value: not value,
        description="Decay only the weights that the update moves towards zero as well; Muon only",
    )

    @model_validator(mode="after")
    def _muon_is_cautious(self) -> Self:
        if self.cautious_weight_decay and self.matrices != "muon":
            raise ValueError("cautious_weight_decay needs matrices = 'muon'")
        return self
