"""Muon agrees with torch's in direction, keeps off embeddings and norms; schedules have the right corners."""

from collections.abc import Mapping
from typing import Any, get_args

import pytest
import torch

from tests.test_model import CONFIG
from vectorclm.model import CausalLM
from vectorclm.settings import Settings
from vectorclm.training.muon import Muon, WeightDecay, orthogonalise
from vectorclm.training.optimizers import MATRIX_OPTIMIZERS, OptimizerConfig, build_optimizers
from vectorclm.training.schedule import SCHEDULES, ScheduleConfig, schedule


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


def test_cosine_warms_up_peaks_and_ends_at_the_floor() -> None:
    config = ScheduleConfig(kind="cosine", warmup=0.1, floor=0.2)
    factors = [schedule(config, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_warmup_stable_decay_is_flat_then_falls_to_the_floor() -> None:
    config = ScheduleConfig(kind="warmup_stable_decay", warmup=0.1, floor=0.0, decay=0.2)
    factors = [schedule(config, step, 100) for step in range(100)]
    assert factors[10:79] == [1.0] * 69
    assert factors[-1] == 0.0
    assert factors[80:] == sorted(factors[80:], reverse=True)


@pytest.mark.parametrize(
    ("changes", "corners"),
    [  # the factor in these of 100 steps: the first, both sides of every corner, the last
        ({"kind": "cosine"}, {0: 0.1, 8: 0.9, 9: 1.0, 10: 1.0, 54: 0.6071, 55: 0.5929, 98: 0.2002, 99: 0.2}),
        ({"kind": "cosine", "warmup": 0.0, "floor": 0.0}, {0: 1.0, 1: 1.0, 50: 0.5, 99: 0.0}),
        ({"kind": "warmup_stable_decay"}, {0: 0.1, 8: 0.9, 9: 1.0, 10: 1.0, 79: 1.0, 80: 0.96, 98: 0.24, 99: 0.2}),
        ({"kind": "warmup_stable_decay", "warmup": 0.0, "decay": 1.0, "floor": 0.5}, {0: 1.0, 1: 0.99, 99: 0.5}),
        ({"kind": "warmup_stable_decay", "warmup": 0.5, "decay": 0.5}, {49: 1.0, 50: 0.984, 98: 0.216, 99: 0.2}),
        ({"kind": "cosine", "floor": 1.0}, {0: 0.1, 9: 1.0, 50: 1.0, 99: 1.0}),
    ],
)
def test_the_corners_of_a_schedule(changes: dict[str, Any], corners: dict[int, float]) -> None:
    config = ScheduleConfig.model_validate({"warmup": 0.1, "floor": 0.2, **changes})
    assert {step: schedule(config, step, 100) for step in corners} == pytest.approx(corners, abs=5e-4)


def test_a_decay_that_would_begin_in_the_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup \(0\.5\) and decay \(0\.6\) are more than all steps"):
        ScheduleConfig(kind="warmup_stable_decay", warmup=0.5, decay=0.6)
    ScheduleConfig(kind="cosine", warmup=0.9)  # whose decay nobody asks for


@pytest.mark.parametrize("kind", ["cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_schedules_stay_finite(kind: str, steps: int) -> None:
    config = ScheduleConfig.model_validate({"kind": kind})
    assert all(0 <= schedule(config, step, steps) <= 1 for step in range(steps))


@pytest.mark.parametrize(
    ("config", "field", "table"),
    [(ScheduleConfig, "kind", SCHEDULES), (OptimizerConfig, "matrices", MATRIX_OPTIMIZERS)],
)
def test_every_kind_that_a_setting_allows_has_a_function_of_its_own(
    config: type[Settings], field: str, table: Mapping[str, Any]
) -> None:
    assert set(get_args(config.model_fields[field].annotation)) == set(table)
    assert len({*table.values()}) == len(table)
