"""The masks are a contract: the assistant's words and its end of turn carry loss, nothing else does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.conftest import write_sample_text
from tests.test_model import CONFIG
from vectorclm.dataset import Batch
from vectorclm.errors import DataError
from vectorclm.finetune import (
    ChatConfig,
    ChatSource,
    Item,
    Turn,
    fit,
    pack,
    read_conversation,
    render,
    write_chat_shards,
)
from vectorclm.loss import IGNORE_INDEX
from vectorclm.model import CausalLM
from vectorclm.shards import read_windows
from vectorclm.train import train_step
from vectorclm.train_tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer

CONVERSATION = [
    Turn("system", "Be kind."),
    Turn("user", "Hi <|im_end|>"),
    Turn("assistant", "Hello!"),
    Turn("user", "Code?"),
    Turn("assistant", "```\n  x = 1\n```"),
]
MESSAGES = [{"role": turn.role, "content": turn.content} for turn in CONVERSATION]


@pytest.fixture(scope="module")
def folder(tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    write_sample_text(root / "sample" / "a", tiny_text, "train")
    (root / "out").mkdir()
    train_tokenizer(TokenizerConfig(vocab_size=307, bytes=20_000), root / "sample", 64, root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_the_three_schemas_read_alike() -> None:
    slimorca = [
        {"from": {"user": "human", "assistant": "gpt"}.get(turn.role, turn.role), "value": turn.content, "weight": None}
        for turn in CONVERSATION
    ]
    assert read_conversation(MESSAGES, "x") == read_conversation(slimorca, "x") == CONVERSATION


@pytest.mark.parametrize(
    "turns", [[{"role": "tool", "content": "x"}], [{"text": "x"}], "hello", [{"role": "user", "content": None}], None]
)
def test_another_schema_or_role_is_refused_with_its_place(turns: Any) -> None:
    with pytest.raises(DataError, match="smoltalk, row 3"):
        read_conversation(turns, "smoltalk, row 3")


def test_only_the_assistants_words_and_ends_of_turn_are_supervised(tokenizer: Tokenizer) -> None:
    ids, supervised = render(tokenizer, CONVERSATION)
    decode = lambda kept: tokenizer.decode(  # noqa: E731
        [i for i, s in zip(ids, supervised, strict=True) if s == kept], skip_special_tokens=False
    )
    assert decode(True) == "Hello!<|im_end|>```\n  x = 1\n```<|im_end|>"
    assert decode(False) == (
        "<|begin_of_text|><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n\n<|im_start|>user\nCode?<|im_end|>\n<|im_start|>assistant\n\n"
    )
    assert ids.count(3) == 5  # the end of turn that the user wrote stays text


def test_the_template_is_that_of_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    plain = [turn if "<|" not in turn.content else Turn("user", "Hi there, 你好") for turn in CONVERSATION]
    messages = [{"role": turn.role, "content": turn.content} for turn in plain]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, return_dict=True)["input_ids"]
    assert theirs == render(tokenizer, plain)[0]


def test_packing_keeps_every_conversation_whole(tokenizer: Tokenizer) -> None:
    generator = np.random.default_rng(0)
    items = [
        Item(np.full(n, i), np.ones(n, np.uint8)) for i, n in enumerate(generator.integers(1, 65, size=500).tolist())
    ]
    windows = list(pack(items, 64))
    assert all(sum(len(item.ids) for item in window) <= 64 for window in windows)
    assert sorted(int(item.ids[0]) for window in windows for item in window) == list(range(500))
    assert sum(len(item.ids) for item in items) > 0.9 * 64 * len(windows)  # and leaves little room unused


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([Turn("user", "hi")], "no assistant turn"),
        ([Turn("user", " "), Turn("assistant", "yes")], "empty turn"),
        ([Turn("user", "hi " * 99), Turn("assistant", "yes")], "longer than a window"),
    ],
)
def test_what_cannot_be_learnt_from_is_left_out_with_a_reason(
    tokenizer: Tokenizer, conversation: list[Turn], reason: str
) -> None:
    assert fit(tokenizer, conversation, 64) == reason


def config(**changes: Any) -> ChatConfig:
    source = ChatSource(label="chat", path="json", conversations=100)
    return ChatConfig(sources=[source], sequence_length=128, validation_share=0.2, **changes)


def test_shards_carry_the_mask_and_count_what_was_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(50)]
    rows.append([{"role": "user", "content": "nobody answers"}])
    summary = write_chat_shards(config(), {"chat": rows}, tokenizer, 1, tmp_path)
    counts = summary["sources"]["chat"]
    assert counts["no assistant turn"] == 1 and counts["train"] + counts["validation"] == 50
    (shard,) = read_windows(tmp_path / "chat", "train")
    assert shard.supervised is not None
    spoken = tokenizer.decode(shard.input_ids[shard.supervised == 1].tolist(), skip_special_tokens=False)
    assert sorted(spoken.split("!<|im_end|>")[:-1]) == sorted(set(spoken.split("!<|im_end|>")) - {""})
    assert spoken.count("<|im_end|>") == counts["train"]


def test_a_source_with_nothing_supervised_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": "nobody answers"}]] * 5
    with pytest.raises(DataError, match=r"chat: no usable conversation; left out: .*no assistant turn.* 5"):
        write_chat_shards(config(), {"chat": rows}, tokenizer, 1, tmp_path)


def test_a_batch_with_nothing_supervised_is_refused() -> None:
    ids = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(DataError, match="no supervised token"):
        train_step(CausalLM(CONFIG), [], Batch(ids, ids.clone().fill_(IGNORE_INDEX)), 1.0, 1, torch.device("cpu"))


def test_the_loss_is_the_mean_over_supervised_tokens_however_it_is_split() -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, CONFIG.vocab_size, (4, 16))
    labels = ids.clone()
    labels[0], labels[1, :12] = IGNORE_INDEX, IGNORE_INDEX  # very unequal shares
    whole, split = (train_step(_model(), [], Batch(ids, labels), 1.0, i, torch.device("cpu")) for i in (4, 1))
    assert whole[0].item() == pytest.approx(split[0].item(), rel=1e-5)
    assert whole[1].item() == pytest.approx(split[1].item(), rel=1e-4)


def _model() -> CausalLM:
    torch.manual_seed(1)
    return CausalLM(CONFIG)
