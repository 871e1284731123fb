"""Every optimizer learns and resumes; Muon agrees with torch's in direction, and keeps off embeddings and norms."""

from typing import get_args

import pytest
import torch

from tests.test_model import CONFIG
from vectorclm.dataset import Batch
from vectorclm.model import CausalLM
from vectorclm.train_step import TrainStep
from vectorclm.training.checkpoint import restore, snapshot
from vectorclm.training.muon import Muon, WeightDecay, orthogonalise
from vectorclm.training.optimizers import MATRIX_OPTIMIZERS, MatrixOptimizer, OptimizerConfig, build_optimizers


@pytest.mark.parametrize("shape", [(32, 32), (24, 64), (64, 24)])
def test_a_step_has_the_direction_of_torchs_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.1, momentum=0.95, weight_decay=WeightDecay(0.0))
    other = torch.optim.Muon([theirs], lr=0.1, momentum=0.95, weight_decay=0.0, nesterov=True)
    for _ in range(3):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    moved, expected = (ours - start).detach().flatten(), (theirs - start).detach().flatten()
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.999
    assert moved.norm() == pytest.approx(expected.norm().item(), rel=0.02)


def test_matrices_of_one_shape_are_orthogonalised_each_on_its_own() -> None:
    matrices = torch.randn(5, 16, 40, generator=torch.Generator().manual_seed(1))
    together = orthogonalise(matrices)
    for alone, one in zip(matrices, together, strict=True):
        assert torch.allclose(orthogonalise(alone[None])[0], one, atol=1e-5)
    values = torch.linalg.svdvals(together)
    assert values.min() > 0.3 and values.max() < 1.3  # five steps bring the singular values near one, not to it


def test_only_the_layers_matrices_go_to_muon() -> None:
    model = CausalLM(CONFIG)
    muon, adamw = build_optimizers(model, OptimizerConfig(learning_rate=0.1, adamw_learning_rate=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert all(name.endswith("_proj.weight") for name in hidden)
    assert rest == set(names.values()) - hidden
    assert "model.embed_tokens.weight" in rest and "model.layers.0.input_layernorm.weight" in rest


def test_every_optimizer_that_the_setting_allows_has_a_function_of_its_own() -> None:
    assert set(get_args(MatrixOptimizer)) == set(MATRIX_OPTIMIZERS)
    assert len({*MATRIX_OPTIMIZERS.values()}) == len(MATRIX_OPTIMIZERS)


@pytest.mark.parametrize("kind", MATRIX_OPTIMIZERS)
def test_every_optimizer_lowers_the_loss_and_continues_from_its_state(kind: MatrixOptimizer) -> None:
    """Ten steps in a row end with the weights of five, saved and loaded as a checkpoint does, and five more."""
    config = OptimizerConfig(learning_rate=0.003, adamw_learning_rate=0.003, matrices=kind, weight_decay=0.01)
    ids = torch.arange(32).repeat(4, 1) % CONFIG.vocab_size
    batch, losses, ends = Batch(ids, ids), [], []
    for breaks in (False, True):
        torch.manual_seed(5)
        model = CausalLM(CONFIG)
        optimizers = build_optimizers(model, config)
        for number in range(10):
            if breaks and number == 5:
                saved = snapshot(number, model, optimizers, "", "")
                model = CausalLM(CONFIG)
                optimizers = build_optimizers(model, config)
                restore(saved, model, optimizers)
            losses.append(float(TrainStep(model, optimizers, 1.0, 4)(batch)[0]))
        ends.append(model.state_dict())
    assert losses[9] < losses[0] - 0.1
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name
