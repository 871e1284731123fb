"""Every kind of attention: fast as plain, cached as whole, and a packed document as one alone."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.conftest import publish_shards, write_sample_text, write_tokenizer
from tests.nn.kinds import EXAMPLE_SPECS, KINDS, ExampleModelConfig, registered, with_attention
from tests.nn.test_layers import doubles, same
from tests.test_model import CONFIG
from vectorclm.dataset import Batch, document_labels, position_ids, to_batch
from vectorclm.evaluation.bits_per_byte import HeldOutWindows, token_losses, windows_scores
from vectorclm.evaluation.multiple_choice import log_likelihoods
from vectorclm.model import CausalLM
from vectorclm.model_config import ModelConfig
from vectorclm.nn.attention import (
    QUERY_BLOCK,
    AttentionMask,
    Documents,
    attention,
    dense_mask,
    document_attention,
    left_padded,
    plain_attention,
)
from vectorclm.nn.attention_kinds import ATTENTION_KINDS, AttentionConfig, AttentionKind
from vectorclm.nn.loss import IGNORE_INDEX as NO
from vectorclm.shards.chat_writer import write_chat_shards
from vectorclm.shards.config import ChatConfig, ChatSource, ShardsConfig
from vectorclm.shards.conversations import Turn, render
from vectorclm.shards.reader import open_shards
from vectorclm.shards.writer import Windows, read_windows, write_shards
from vectorclm.tokenizer import BOS_ID, EOS_ID, PAD_ID, load_tokenizer
from vectorclm.train_step import TrainStep

CPU = torch.device("cpu")
LENGTH = 96


@pytest.fixture(scope="module")
def tokenizer(tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny_text, 307, 20_000, LENGTH))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    with registered(request.param):
        yield request.param


@pytest.fixture
def model(kind: str) -> CausalLM:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"vocab_size": 307, "max_position_embeddings": LENGTH})
    model = CausalLM(with_attention(config, kind))
    with torch.no_grad():
        for p in model.parameters():
            p *= 4.0  # so that attention is no average
    return model.double()


def test_positions_and_labels_by_hand() -> None:
    a, b, c = 10, 11, 12
    windows = np.array(
        [
            [BOS_ID, a, EOS_ID, BOS_ID, b, EOS_ID, PAD_ID, PAD_ID],
            [BOS_ID, a, b, c, a, b, c, a],  # the beginning of a long document
            [b, c, EOS_ID, c, EOS_ID, BOS_ID, EOS_ID, PAD_ID],  # the rests of two long ones, and an empty one
        ]
    )
    positions = position_ids(windows)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 0, 1, 0]]
    assert document_labels(windows, positions).tolist() == [
        [NO, a, EOS_ID, NO, b, EOS_ID, NO, NO],
        [NO, a, b, c, a, b, c, a],
        [NO, c, EOS_ID, NO, EOS_ID, NO, EOS_ID, NO],
    ]
    assert document_labels(windows, None).tolist() == [
        [BOS_ID, a, EOS_ID, BOS_ID, b, EOS_ID, NO, NO],
        [BOS_ID, a, b, c, a, b, c, a],
        [b, c, EOS_ID, NO, EOS_ID, BOS_ID, EOS_ID, NO],
    ]
    documents = Documents.at(torch.from_numpy(positions), CPU)
    assert documents is not None and documents.cu_seqlens.tolist() == [0, 3, 6, 8, 16, 19, 21, 23, 24]


def test_every_kind_has_a_row_and_is_tested() -> None:
    assert set(get_args(AttentionKind)) == set(ATTENTION_KINDS) == set(KINDS) - set(EXAMPLE_SPECS)
    assert len({row.model_type for row in ATTENTION_KINDS.values()}) == len(ATTENTION_KINDS)  # of config.json
    assert {name: row.is_causal for name, row in ATTENTION_KINDS.items() if row.model_type == "llama"} == {
        "causal": True
    }


def test_settings_at_their_defaults_leave_fingerprints_alone() -> None:
    """A kind keeps its fingerprints when another kind gets a setting."""
    assert AttentionConfig().model_dump() == {}, "each field of AttentionConfig needs `exclude_if` for its default"
    for name, (config, _) in KINDS.items():
        least = type(config)(kind=name).model_dump()
        assert least.keys() <= {"kind"}, f"{name}: fields without `exclude_if` for their default: {least}"
        assert type(config)(**{"kind": name, **config.model_dump()}) == config  # nothing is lost


def test_the_settings_of_a_kind_hide_keys_in_the_texts_of_these_tests(kind: str) -> None:
    """Otherwise the tests would check causal attention again. A kind with other parameters may have its rule."""
    is_causal = ATTENTION_KINDS[kind].mask_rule is ATTENTION_KINDS["causal"].mask_rule  # type: ignore[index]
    pairs = [(layer, key) for layer in range(6) for key in range(13)]
    assert all(KINDS[kind].attends(layer, 12, key) for layer, key in pairs) == is_causal


def test_a_setting_that_a_kind_does_not_have_is_refused() -> None:
    """It would change the fingerprint and nothing else; one that `config.json` lacks would be lost with the model."""
    with registered("sliding"), registered("alternating"):
        changed = {**CONFIG.model_dump(), "attention": {"kind": "sliding", "window": 3}}
        assert ExampleModelConfig.model_validate(changed).attention.window == 3
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(ATTENTION_KINDS, "sliding", replace(EXAMPLE_SPECS["sliding"], config_keys={}))  # type: ignore[misc]
            with pytest.raises(ValueError, match=r"attention\.window: sliding attention has no such setting"):
                ExampleModelConfig.model_validate(changed)


def test_a_field_that_transformers_would_ignore_is_known_to_the_export() -> None:
    """A kind or a setting that changes what a model computes has a `model_type` of its own."""
    assert ModelConfig.model_fields.keys() - LlamaConfig().to_dict().keys() <= {
        "attention", "hidden_dropout", "rope_theta"
    }  # fmt: skip


def test_inputs_that_contradict_each_other_are_refused() -> None:
    decoder, ids = CausalLM(CONFIG).model, torch.randint(5, 300, (1, 8))
    documents = Documents.at(torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), CPU)
    seen = torch.ones(1, 8, 8).tril().bool()
    for extra in (
        {"mask_BTS": seen},
        {"position_ids_BT": torch.arange(8)[None]},
        {"cache": CausalLM(CONFIG).new_cache(1, 8)},
    ):
        with pytest.raises(ValueError, match="documents exclude"):
            decoder(ids, documents=documents, **extra)
    with pytest.raises(ValueError, match="position_ids_BT needs mask_BTS"):
        decoder(ids, position_ids_BT=torch.arange(8)[None])


class Case(NamedTuple):
    """What a forward pass asks of attention, and the same in plain Python."""

    tokens: int
    keys: int
    mask: AttentionMask
    places: Callable[[int, int, int], tuple[int, int] | None]  # positions of a row's query and key, None if apart


def cases() -> Mapping[str, Case]:
    """Every way in which the product calls attention, for two rows of keys."""
    sizes, keys, padding = (70, 1, QUERY_BLOCK - 49), QUERY_BLOCK + 22, (0, 17)
    document = [number for number, size in enumerate(sizes) for _ in range(size)]
    position = [place for size in sizes for place in range(size)]
    documents = Documents.at(torch.tensor([position, position]), CPU)
    # A beginning of 6 tokens, and two branches of 7 and 5 that share it.
    branch, depth = [-1] * 6 + [0] * 7 + [1] * 5, [*range(6), *range(6, 13), *range(6, 11)]
    tree = torch.tensor([[[b in (-1, a) for b in branch] for a in branch]] * 2).tril()

    def padded(tokens: int, keys: int) -> Case:
        position_ids, key_position_ids, mask = left_padded(torch.tensor(padding), tokens, keys)

        def places(row: int, t: int, s: int) -> tuple[int, int] | None:
            query = t + keys - tokens
            if query < padding[row]:
                return (0, 0) if s == query else None  # padding attends to itself
            return (query - padding[row], s - padding[row]) if s >= padding[row] else None

        return Case(tokens, keys, AttentionMask(None, mask[:, None], position_ids, key_position_ids), places)

    return {
        "a window": Case(keys, keys, AttentionMask(), lambda row, t, s: (t, s)),
        "the newest of a cache": Case(5, keys, AttentionMask(), lambda row, t, s: (t + keys - 5, s)),
        "the last of a cache": Case(1, keys, AttentionMask(), lambda row, t, s: (t + keys - 1, s)),
        "documents": Case(
            keys,
            keys,
            AttentionMask(documents),
            lambda row, t, s: (position[t], position[s]) if document[t] == document[s] else None,
        ),
        "padded prompts": padded(40, 40),
        "padded rows that continue": padded(5, 40),
        "branches of a tree": Case(
            18,
            18,
            AttentionMask(None, tree[:, None], torch.tensor([depth, depth])),
            lambda row, t, s: (depth[t], depth[s]) if s <= t and branch[s] in (-1, branch[t]) else None,
        ),
        "a place in a buffer": Case(
            1,
            40,
            AttentionMask(
                None,
                (torch.arange(40) <= 25).expand(2, 1, 1, 40),
                torch.tensor([[25], [25]]),
                torch.arange(40).expand(2, 40),
            ),
            lambda row, t, s: (25, s) if s <= 25 else None,
        ),
    }


@pytest.mark.parametrize("case", cases())
def test_attention_is_a_loop_over_the_keys_that_the_kind_allows(kind: str, case: str) -> None:
    """The loop knows the kind's rule in plain Python only."""
    tokens, keys, mask, places = cases()[case]
    mask = mask._replace(config=KINDS[kind].config)
    q, k, v = (torch.randn(2, heads, size, 8).double() for heads, size in ((4, tokens), (2, keys), (2, keys)))
    for layer in range(6):
        expected = torch.empty_like(q)
        seen = torch.zeros(2, tokens, keys, dtype=torch.bool)
        for row in range(2):
            for t in range(tokens):
                pairs = ((s, places(row, t, s)) for s in range(keys))
                visible = [s for s, pair in pairs if pair is not None and KINDS[kind].attends(layer, *pair)]
                seen[row, t, visible] = True
                for head in range(4):
                    weights = (k[row, head // 2, visible] @ q[row, head, t] / 8**0.5).softmax(0)
                    expected[row, head, t] = weights @ v[row, head // 2, visible]
        assert torch.equal(dense_mask(mask, layer, tokens, keys, CPU).expand(2, 1, tokens, keys)[:, 0], seen)
        torch.testing.assert_close(attention(q, k, v, mask, layer, 0.0), expected, rtol=0, atol=1e-10)


def test_attention_and_its_gradients_are_the_plain_ones(kind: str) -> None:
    for tokens, keys, mask, _ in cases().values():
        q, k, v = doubles(2, 4, tokens, 8), doubles(2, 2, keys, 8), doubles(2, 2, keys, 8)
        mask = mask._replace(config=KINDS[kind].config)
        same(attention(q, k, v, mask, 1, 0.0), plain_attention(q, k, v, mask, 1), [q, k, v])


@torch.no_grad()
def test_the_rule_of_a_kind_knows_its_layer() -> None:
    """Alternating attention is causal in layer 0 and sliding in layer 1."""
    ids = torch.randint(5, 307, (2, 60), generator=torch.Generator().manual_seed(2))
    shape = CONFIG.model_copy(update={"num_hidden_layers": 2})
    alternating = with_attention(shape, "alternating")
    sliding = alternating.attention.model_copy(update={"kind": "sliding"})
    models = [CausalLM(config) for config in (alternating, shape, shape.model_copy(update={"attention": sliding}))]
    weights = {name: weight * 4 for name, weight in models[0].state_dict().items()}
    with registered("sliding"), registered("alternating"):
        for silent, like in ((1, 1), (0, 2)):  # without the attention of a layer, only the other one counts
            silenced = {name: w * (f"layers.{silent}.self_attn.o_proj" not in name) for name, w in weights.items()}
            for each in models:
                each.load_state_dict(silenced)
            apart = [(models[0](ids) - models[other](ids)).abs().max() for other in (like, 3 - like)]
            assert apart[0] < 1e-4 < 0.01 < apart[1]


def test_positions_with_a_cache_need_those_of_the_keys(model: CausalLM) -> None:
    ids = torch.tensor([[5, 6]])
    seen = torch.ones(1, 2, 2).tril().bool()
    with pytest.raises(ValueError, match="needs key_position_ids_BS"):
        model.model(ids, model.new_cache(1, 2), position_ids_BT=torch.tensor([[0, 1]]), mask_BTS=seen)


@torch.no_grad()
def test_the_next_logits_are_the_same_cached_padded_and_whole(model: CausalLM) -> None:
    ids = torch.randint(5, 307, (2, 60), generator=torch.Generator().manual_seed(2))
    whole, padding = model(ids), torch.tensor([0, 17])
    for pieces in ([60], [1] * 60, [7, 1, 1, 40, 11]):
        cache, padded = model.new_cache(2, 60), model.new_cache(2, 60)
        found = torch.cat([model(part, cache) for part in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)
        last = [model.next_logits(part, padded, padding) for part in ids.split(pieces, dim=1)][-1]
        torch.testing.assert_close(last[0], whole[0, -1], rtol=0, atol=1e-9)
        torch.testing.assert_close(last[1], model(ids[1:, 17:])[0, -1], rtol=0, atol=1e-9)


def test_choices_that_share_a_beginning_score_as_each_alone(model: CausalLM) -> None:
    shared, generator = list(range(20, 60)), torch.Generator().manual_seed(3)
    ends = [torch.randint(60, 307, (size,), generator=generator).tolist() for size in (3, 9, 20)]
    (together,) = log_likelihoods(model, [[([BOS_ID, *shared, *end], len(end)) for end in ends]], 4, "choices")
    for end, found in zip(ends, together, strict=True):
        ((single,),) = log_likelihoods(model, [[([BOS_ID, *shared, *end], len(end))]], 4, "choices")
        logits = model(torch.tensor([[BOS_ID, *shared, *end]]))[0, :-1].log_softmax(-1)
        plain = logits[-len(end) :].gather(1, torch.tensor(end)[:, None]).sum().item()
        assert found.log_likelihood == pytest.approx(plain, abs=1e-4)
        assert single.log_likelihood == pytest.approx(plain, abs=1e-4)


def test_a_saved_model_keeps_its_attention(kind: str, tmp_path: Path) -> None:
    """transformers either computes the same logits or refuses the model."""
    torch.manual_seed(0)
    model = CausalLM(with_attention(CONFIG, kind)).eval()
    model.save_pretrained(tmp_path)
    assert CausalLM.from_pretrained(tmp_path).config == model.config
    ids = torch.randint(5, 300, (2, 50), generator=torch.Generator().manual_seed(4))
    try:
        judge = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    except ValueError as error:
        assert ATTENTION_KINDS[kind].model_type in str(error)  # type: ignore[index]
        return
    with torch.no_grad():
        assert (model(ids) - judge(input_ids=ids).logits).abs().max() < 1e-4


def test_attention_is_that_of_a_block_diagonal_mask() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 8, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3], [0, 1, 0, 1, 2, 3, 4, 0]])
    documents = Documents.at(positions, CPU)
    assert documents is not None
    number = (positions == 0).cumsum(1)
    mask = (number[:, :, None] == number[:, None]) & torch.ones(8, 8).tril().bool()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=True)
    found = document_attention(q, k, v, documents, 0.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        *(torch.autograd.grad((y * weights).sum(), (q, k, v)) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def losses(model: CausalLM, batch: Batch) -> list[float]:
    """The loss of every label, sorted."""
    positions = None if batch.position_ids is None else batch.position_ids[:, :-1]
    targets = batch.labels[:, 1:]
    found = token_losses(model, batch.input_ids[:, :-1], targets, Documents.at(positions, CPU))
    return sorted(found[targets != NO].tolist())


def alone(model: CausalLM, ids: Any, labels: Any) -> list[float]:
    return losses(model, Batch(torch.tensor(ids)[None], torch.tensor(labels)[None]))


def test_a_packed_document_costs_what_it_costs_alone(
    model: CausalLM, tokenizer: Tokenizer, tiny_text: list[str], tmp_path: Path
) -> None:
    texts = [text[: 5 + 7 * i] for i, text in enumerate(tiny_text[:40])]
    for split in ("train", "validation"):
        write_sample_text(tmp_path / "sample" / "a", texts, split)
    write_shards(ShardsConfig(sequence_length=LENGTH), tmp_path / "sample", tokenizer, tmp_path / "out")
    (shard,) = read_windows(tmp_path / "out" / "a", "train")
    expected: list[float] = []
    before = {"window": -1, "end": 0}
    for piece in pq.read_table(tmp_path / "out" / "a" / "train-00000.documents.parquet").to_pylist():
        start = before["end"] if piece["window"] == before["window"] else 0
        ids = shard.input_ids[piece["window"], start : piece["end"]].astype(np.int64)
        expected += alone(model, ids, ids) if len(ids) > 1 else []
        before = piece
    found = losses(model, to_batch(shard, document_mask=True))
    np.testing.assert_allclose(found, sorted(expected), rtol=0, atol=1e-9)
    across = losses(model, to_batch(shard))
    assert len(across) > len(found) and abs(np.mean(across) - np.mean(found)) > 1e-3  # the mask is not for nothing
    again = publish_shards(str(tmp_path / "store"), tmp_path / "work", {"a": {"input_ids": shard.input_ids}}, 4096)
    with open_shards(again, "train") as readers:
        scores = windows_scores(model, HeldOutWindows(readers, [1] * 307, document_mask=True), 7)
    assert scores["a"]["loss"] == pytest.approx(np.mean(expected), abs=1e-6)


def test_a_packed_conversation_costs_what_it_costs_alone(model: CausalLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        [{"role": "user", "content": f"Why {i}?"}, {"role": "assistant", "content": "So. " * (1 + i % 3)}]
        for i in range(60)
    ]
    source = ChatSource(label="chat", path="json", conversations=100)
    config = ChatConfig(sources=[source], sequence_length=LENGTH, validation_share=0.1)
    summary = write_chat_shards(config, {"chat": rows}, tokenizer, 1, tmp_path)
    expected: list[float] = []
    for row in rows:
        ids, supervised = render(tokenizer, [Turn(turn["role"], turn["content"]) for turn in row])  # type: ignore[arg-type]
        expected += alone(model, ids, [i if s else NO for i, s in zip(ids, supervised, strict=True)])
    found: list[float] = []
    for split in ("train", "validation"):
        for shard in read_windows(tmp_path / "chat", split):
            assert shard.supervised is not None
            found += losses(model, to_batch(shard, document_mask=True))
    assert summary["train"]["windows"] < 0.8 * summary["sources"]["chat"]["train"]  # several stand in one window
    np.testing.assert_allclose(sorted(found), sorted(expected), rtol=0, atol=1e-9)


def test_a_training_step_is_the_same_in_any_micro_batches(model: CausalLM) -> None:
    """In single precision, as training is."""
    windows = np.array([[BOS_ID, *range(5, 20 + i), EOS_ID, BOS_ID, *range(30, 44 - i), EOS_ID] for i in range(4)])
    batch = to_batch(Windows(windows, None), document_mask=True)
    whole, split = (TrainStep(model.float(), [], 1e9, i)(batch)[0].item() for i in (4, 1))
    model.double()
    rows = [alone(model, part, part) for ids in windows for part in np.split(ids, np.flatnonzero(ids == BOS_ID)[1:])]
    assert whole == pytest.approx(split, rel=1e-6)
    assert whole == pytest.approx(np.mean([loss for row in rows for loss in row]), rel=1e-5)
