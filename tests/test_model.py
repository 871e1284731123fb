"""transformers is the judge: the same weights give the same logits, losses and continuations."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from vectorclm.config import load_experiment
from vectorclm.errors import DataError
from vectorclm.loss import CHUNK, IGNORE_INDEX, chunked_cross_entropy
from vectorclm.model import CausalLM, ModelConfig

CONFIG = ModelConfig(
    vocab_size=307,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,  # not hidden_size / heads: the field must be honoured
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(CONFIG).eval()
    with torch.no_grad():  # larger than at the start of training, so that differences would show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def judge(model: CausalLM, tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    judge: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return judge


def test_logits_and_loss_are_those_of_transformers(model: CausalLM, judge: torch.nn.Module) -> None:
    ids = torch.randint(0, CONFIG.vocab_size, (3, 64), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :20] = IGNORE_INDEX
    with torch.no_grad():
        theirs = judge(input_ids=ids, labels=labels)
        assert (model(ids) - theirs.logits).abs().max() < 1e-4
        loss = model.loss(ids, labels) / (labels[:, 1:] != IGNORE_INDEX).sum()
    assert loss.item() == pytest.approx(theirs.loss.item(), abs=1e-5)


def test_state_dict_has_llamas_keys_and_the_tied_embedding_once(model: CausalLM, judge: torch.nn.Module) -> None:
    theirs = set(judge.state_dict()) - {"lm_head.weight"}
    assert set(model.state_dict()) == theirs
    assert sum(p.numel() for p in judge.parameters()) == CONFIG.parameters == sum(p.numel() for p in model.parameters())


def test_a_cached_pass_in_any_pieces_equals_the_whole(model: CausalLM) -> None:
    ids = torch.randint(0, CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(ids)
        for pieces in ([40], [1] * 40, [7, 1, 1, 20, 11]):
            cache = model.new_cache(2, 40)
            parts = [model(part, cache) for part in ids.split(pieces, dim=1)]
            assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-4


def test_round_trip_through_transformers(judge: torch.nn.Module, model: CausalLM, tmp_path: Path) -> None:
    judge.save_pretrained(tmp_path)  # type: ignore[operator]
    again = CausalLM.from_pretrained(tmp_path)
    assert again.config == CONFIG
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_what_is_no_model_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a model directory"):
        CausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError):
        CausalLM.from_pretrained(tmp_path)


def test_a_sequence_longer_than_the_models_is_refused(model: CausalLM) -> None:
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_dropout_acts_in_training_only() -> None:
    model = CausalLM(CONFIG.model_copy(update={"hidden_dropout": 0.5, "attention_dropout": 0.5}))
    ids = torch.arange(32)[None]
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


@pytest.mark.parametrize(("name", "parameters"), [("small", 8_621_312), ("base", 50_348_544)])
def test_the_experiments_have_the_parameters_they_state(name: str, parameters: int) -> None:
    config = load_experiment(name)[0].model
    with torch.device("meta"):
        model = CausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters == parameters


def test_chunked_loss_has_the_plain_ones_value_and_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2 * CHUNK + 5, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(50, 8, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 50, (len(hidden),), generator=generator)
    targets[::3] = IGNORE_INDEX
    targets[CHUNK : 2 * CHUNK] = IGNORE_INDEX  # a whole chunk without a label
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = chunked_cross_entropy(ours[0], ours[1], targets)
    plain = torch.nn.functional.cross_entropy(theirs[0] @ theirs[1].T, targets, reduction="sum")
    (loss * 0.7).backward()
    (plain * 0.7).backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None
        assert (mine.grad - other.grad).abs().max() < 1e-10
