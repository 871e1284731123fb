"""The bench of learning runs whole on a little of the generated world, and its rules give what they say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli import main
from tests.test_model import CONFIG
from vectorclm.bench.quality import Arms, Tuned, _saved, quality, rates, rates_of, setting, short_arms
from vectorclm.config import changed, load_experiment
from vectorclm.errors import ConfigError
from vectorclm.model import CausalLM
from vectorclm.stages import plans
from vectorclm.store.artifact import Store
from vectorclm.training.muon import Muon, WeightDecay
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

LITTLE: dict[str, Any] = {
    "sample.bytes": 200_000,
    "sample.validation_share": 0.1,
    "tokenizer.bytes": 50_000,
    "model.num_hidden_layers": 1,
    "pretrain.batch_size": 4,
    "pretrain.validation_windows": 4,
    "pretrain.phases": [{"tokens": 8 * 4 * 128}],
}


def trained(folder: Path) -> list[dict[str, Any]]:
    manifests = (folder / "pretrain").glob("*/manifest.json")
    return [json.loads(path.read_text())["config"]["optimizer"] for path in manifests]


def test_the_bench_is_whole_and_a_second_one_trains_nothing(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = list(quality(store, None, LITTLE))
    assert [row.unit for row in rows] == ["tokens"] + 5 * ["nats/token"] + ["nats/token"] * (len(rows) - 6)
    assert all(row.met is not None for row in rows)
    optimizers = trained(tmp_path)
    assert sum(optimizer.get("matrices") == "adamw" for optimizer in optimizers) >= 4
    assert list(quality(store, None, LITTLE)) == rows
    assert len(trained(tmp_path)) == len(optimizers)


def test_the_command_does_not_train_on_another_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for what in ("quality", "rates"):
        assert main(["bench", what, "--store", str(tmp_path)]) == 2
        assert f'"bench {what}" parameter --data requires an argument' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes on a GPU: vectorclm bench rates")
def test_rates_without_a_gpu_are_not_run(tmp_path: Path) -> None:
    rows = list(rates(Store(str(tmp_path)), None))
    assert len(rows) == 2 and all(row.met is None and row.why == "torch sees no GPU here" for row in rows)


def test_rates_of_a_short_training_are_carried_on(tmp_path: Path) -> None:
    """Of `tiny` itself on a 31st of its tokens in batches of a quarter."""
    store = Store(str(tmp_path))
    tiny = load_experiment("tiny")[0].pretrain
    muon, adamw = rates_of(short_arms(store, None, "tiny", LITTLE))
    assert (muon.ours, adamw.ours) == (tiny.optimizer.learning_rate, tiny.optimizer.adamw_learning_rate)
    factor = (tiny.tokens / 4096) ** -0.32 * (tiny.batch_size / 4) ** 0.5
    for row in (muon, adamw):
        assert row.why.startswith(f"{factor:.3f} of the optimum ")
        optimum = float(row.why.split("optimum ")[1].split()[0])
        assert row.peer == pytest.approx(factor * optimum, rel=0.01) and row.met is (row.ratio <= row.ask)
    best = min(trained(tmp_path), key=lambda optimizer: abs(optimizer["learning_rate"] - muon.peer / factor))
    assert sum(optimizer["learning_rate"] == best["learning_rate"] for optimizer in trained(tmp_path)) >= 3


def test_the_optimum_is_the_parabolas_and_none_at_an_end() -> None:
    losses = {rate: 3 + (math.log2(rate) - math.log2(0.01)) ** 2 for rate in (0.004, 0.008, 0.016)}
    assert Tuned(losses).rate == 0.008 and Tuned(losses).optimum == pytest.approx(0.01)
    assert Tuned({0.004: 3.0, 0.008: 2.0, 0.016: 1.0}).optimum is None
    assert Tuned({0.004: 3.0, 0.008: 2.0, 0.016: math.inf}).optimum is None


@pytest.mark.parametrize(
    ("goal", "share", "met"),
    [(3.0, 0.5, True), (2.5, math.sqrt(0.5), True), (2.1, 0.9330, False), (5.0, 0.25, True), (1.9, None, False)],
)
def test_the_tokens_saved_lie_between_two_budgets(tmp_path: Path, goal: float, share: float | None, met: bool) -> None:
    arms = Arms(setting(Store(str(tmp_path)), None, LITTLE), Store(str(tmp_path)), None)
    muon, budgets = Tuned({0.01: 2.0}), {0.25: 4.0, 0.5: 3.0, 1.0: 2.0}
    for adamw, apart in ((goal, goal + 1), (goal + 1, goal)):  # the better of the two is the goal
        row = _saved("", arms, muon, Tuned({0.01: adamw}), apart, budgets)
        assert row.met is met and row.ratio == (None if share is None else pytest.approx(share, abs=1e-4))
        assert row.ours == (None if share is None else pytest.approx(share * 4096, abs=1))


def test_new_settings_leave_old_fingerprints_as_they_are() -> None:
    tiny = load_experiment("tiny")[0]
    for key, value in (
        ("optimizer.matrices", "adamw"),
        ("optimizer.cautious_weight_decay", True),
        ("zero_output_projections", True),
    ):
        other = changed(tiny, {f"pretrain.{key}": value})
        name = key.rpartition(".")[2]
        assert name not in json.dumps(plans(tiny)["pretrain"].config)
        assert name in json.dumps(plans(other)["pretrain"].config)
        assert plans(other)["pretrain"].fingerprint != plans(tiny)["pretrain"].fingerprint
    with pytest.raises(ConfigError, match="cautious_weight_decay needs matrices = 'muon'"):
        changed(tiny, {"pretrain.optimizer.matrices": "adamw", "pretrain.optimizer.cautious_weight_decay": True})


def test_adamw_alone_trains_the_matrices_at_their_own_rate() -> None:
    config = OptimizerConfig(learning_rate=0.3, adamw_learning_rate=0.1, matrices="adamw", weight_decay=0.2)
    model = CausalLM(CONFIG)
    matrices, rest = (optimizer.param_groups[0] for optimizer in build_optimizers(model, config))
    assert (matrices["lr"], matrices["weight_decay"], rest["lr"], rest["weight_decay"]) == (0.3, 0.2, 0.1, 0.0)
    with_muon = build_optimizers(model, replace_matrices(config))
    assert matrices["params"] == with_muon[0].param_groups[0]["params"]
    assert rest["params"] == with_muon[1].param_groups[0]["params"]


def replace_matrices(config: OptimizerConfig) -> OptimizerConfig:
    return config.model_copy(update={"matrices": "muon"})


def test_cautious_decay_spares_what_the_update_moves_away_from_zero() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(16, 24), torch.randn(16, 24)
    moved = {}
    for name, decay, cautious in (("none", 0.0, False), ("plain", 0.5, False), ("cautious", 0.5, True)):
        p = torch.nn.Parameter(start.clone())
        p.grad = gradient.clone()
        Muon([p], 0.1, 0.95, WeightDecay(decay, cautious)).step()
        moved[name] = p.detach()
    update = start - moved["none"]
    towards_zero = update * start >= 0
    assert 0.2 < towards_zero.float().mean() < 0.8
    assert torch.allclose(moved["plain"], moved["none"] - 0.05 * start, atol=1e-6)
    assert torch.allclose(moved["cautious"], moved["none"] - 0.05 * start * towards_zero, atol=1e-6)


def test_zero_output_projections_leave_the_embedding_alone() -> None:
    model = CausalLM(CONFIG)
    model.zero_output_projections()
    ids = torch.randint(5, CONFIG.vocab_size, (2, 8))
    assert torch.equal(model.model(ids), model.model.norm(model.model.embed_tokens(ids)))
    assert model.model.layers[0].self_attn.qkv_proj.weight.abs().sum() > 0  # type: ignore[union-attr, operator]
