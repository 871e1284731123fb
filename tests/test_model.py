"""transformers is the judge: the same weights give the same logits, losses and continuations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import random_model
from vectorclm.config import load_experiment
from vectorclm.dataset import Batch
from vectorclm.errors import DataError, VectorCLMError
from vectorclm.inference.generate import generate
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.nn.loss import CHUNK, IGNORE_INDEX, chunked_cross_entropy
from vectorclm.tokenizer import PAD_ID
from vectorclm.train_step import TrainStep
from vectorclm.training.optimizers import OptimizerConfig, build_optimizers

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
    return random_model(CONFIG).eval()


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


def test_trained_weights_give_the_logits_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = CausalLM(CONFIG)
    optimizers = build_optimizers(model, OptimizerConfig(learning_rate=0.02, adamw_learning_rate=0.01))
    ids = torch.arange(64).repeat(4, 1) * torch.tensor([[1], [2], [3], [5]]) % CONFIG.vocab_size
    batch = Batch(ids, ids)
    step = TrainStep(model, optimizers, 1.0, 4)
    losses = [float(step(batch)[0]) for _ in range(15)]
    assert losses[-1] < losses[0] / 2
    model.eval().save_pretrained(tmp_path)
    judge = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert (model(ids) - judge(input_ids=ids).logits).abs().max() < 1e-4


def test_cached_logits_are_those_of_transformers_to_the_limit(model: CausalLM, judge: torch.nn.Module) -> None:
    ids = torch.randint(0, CONFIG.vocab_size, (2, 64), generator=torch.Generator().manual_seed(5))
    ours, theirs = model.new_cache(2, 64), None
    with torch.no_grad():
        for part in ids.split([9, *[1] * 10, 30, *[1] * 15], dim=1):
            answer = judge(input_ids=part, past_key_values=theirs, use_cache=True)
            theirs = answer.past_key_values
            assert (model(part, ours) - answer.logits).abs().max() < 1e-4
    assert ours.seen == theirs.get_seq_length() == CONFIG.max_position_embeddings


def test_continuations_are_those_of_transformers_also_padded_on_the_left(
    model: CausalLM, judge: torch.nn.Module
) -> None:
    """transformers continues prompts of unequal length in one batch, we each on its own: to the limit of positions."""
    generator = torch.Generator().manual_seed(6)
    prompts = [torch.randint(5, CONFIG.vocab_size, (n,), generator=generator).tolist() for n in (3, 17, 40)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[PAD_ID] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = judge.generate(  # type: ignore[operator]
        padded, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=PAD_ID
    )
    for prompt, found in zip(prompts, theirs[:, longest:].tolist(), strict=True):
        assert list(generate(model, prompt, 24, stop_ids=())) == found
    with torch.no_grad():
        logits = judge(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for row, prompt in enumerate(prompts):
            assert (model(torch.tensor([prompt]))[0] - logits[row, -len(prompt) :]).abs().max() < 1e-4


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
    judge.save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    assert "lm_head.weight" not in stored and sum(tensor.numel() for tensor in stored.values()) == CONFIG.parameters
    again = CausalLM.from_pretrained(tmp_path / "theirs")
    assert again.config == CONFIG
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    for once, folder in ((model, tmp_path / "ours"), (again, tmp_path / "again")):
        once.save_pretrained(folder)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    rights = [(tmp_path / "ours" / name).stat().st_mode for name in ("config.json", "model.safetensors")]
    assert rights[0] == rights[1]  # who may read the one may read the other


def test_what_is_no_model_is_refused_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a model directory"):
        CausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(DataError, match="is not a model directory"):
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


@pytest.mark.parametrize("ignored", [0, 1 / 3, 1])
def test_chunked_loss_has_the_plain_ones_value_and_gradients(ignored: float) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(2 * CHUNK + 5, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(50, 8, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 50, (len(hidden),), generator=generator)
    if ignored:
        targets[:: round(1 / ignored)] = IGNORE_INDEX
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2', and the supported types are: llama"),
        ({"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        ({"tie_word_embeddings": False}, "only models with tied embeddings"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "scaled positions"),
        ({"rope_scaling": {"type": "llama3"}}, "scaled positions"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings"),
        ({"num_key_value_heads": 6}, r"size mismatch for model\.layers"),
        ({"vocab_size": 10**12}, r"does not fit its config\.json: 48,000,000,071,760 parameters in \d{3},\d{3} bytes"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: Input should be less than or equal to 512"),
    ],
)
def test_a_model_that_computes_something_else_is_refused(
    model: CausalLM, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(VectorCLMError, match=message):
        CausalLM.from_pretrained(tmp_path)


def test_a_broken_model_directory_is_named(model: CausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(DataError, match="is not a model directory"):
        CausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    model.save_pretrained(tmp_path / "whole")
    weights.write_bytes((tmp_path / "whole" / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="holds no table of settings"):
        CausalLM.from_pretrained(tmp_path)
