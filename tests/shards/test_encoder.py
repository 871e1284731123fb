"""A faster encoder writes the shards only where it proves identical, and what was written is read back and counted."""

import json
import logging
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from tests.conftest import skip_or_fail, write_sample_text
from vectorclm.corpus.sample_reader import read_texts
from vectorclm.corpus.synthetic_world import WorldConfig, rows
from vectorclm.errors import CorruptArtifactError, DataError
from vectorclm.shards.audit import audit, check_round_trip
from vectorclm.shards.blocks import ShardDescriber
from vectorclm.shards.config import ShardsConfig
from vectorclm.shards.encoder import JUDGE_EVERY, Encoder, Gigatoken, adversarial, open_encoder
from vectorclm.shards.writer import read_windows, write_shards
from vectorclm.store.artifact import MANIFEST, StageSpec, Store, build
from vectorclm.store.resumable import ResumableUpload
from vectorclm.store.uploads import EarlyUpload
from vectorclm.tokenizer import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    SPECIAL_TOKENS,
    TokenizerConfig,
    encode,
    load_tokenizer,
    token_lengths,
)
from vectorclm.train_tokenizer import train_tokenizer

CONFIG = ShardsConfig(sequence_length=32, shard_bytes=4096)


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if find_spec("gigatoken") is None:
        skip_or_fail("gigatoken is not installed: pip install -c constraints.txt gigatoken")


@pytest.fixture(scope="module")
def documents() -> list[str]:
    world = WorldConfig(seed=3, documents=300, conversations=10)
    return [str(row["text"]) for name in ("stories", "lessons") for row in rows(world, name)]


@pytest.fixture(scope="module")
def sample(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    write_sample_text(folder / "a", documents, "train")
    write_sample_text(folder / "a", documents[:20], "validation")
    write_sample_text(folder / "b", documents[::-1], "train")
    write_sample_text(folder / "b", documents[-20:], "validation")
    return folder


@pytest.fixture(scope="module")
def folder(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TokenizerConfig(vocab_size=400, bytes=40_000), sample, 64, out)
    return out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Tokenizer:
    """The tokenizer of a directory whose merges were changed: the first is now the last."""
    record = json.loads((folder / "tokenizer.json").read_text())
    merges = record["model"]["merges"]
    merges.append(merges.pop(0))
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    return load_tokenizer(tmp_path)


def shard_bytes(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*.arrow"))}


def noise(seed: int) -> str:
    """Characters from all of Unicode, digits, spaces and pieces of words, in no order."""
    rng = random.Random(seed)
    kinds = [
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: rng.choice(["'s", "'ll", "'", "n't", *SPECIAL_TOKENS, "<|im_", "|>"]),
        lambda: rng.choice([" ", "\n", "\r\n", "\t", "\u00a0", "\u3000"]) * rng.randrange(1, 9),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 30))),
        lambda: "".join(rng.choices("aeiou\u0301stn", k=rng.randrange(1, 12))),
    ]
    return "".join(rng.choice(kinds)() for _ in range(300))


def test_hard_strings_noise_and_documents_get_the_same_ids(tokenizer: Tokenizer, documents: list[str]) -> None:
    encoder = open_encoder(tokenizer)
    assert encoder.name.startswith("gigatoken 0.") and encoder.rejected is None
    for texts in (list(adversarial(tokenizer)), [noise(seed) for seed in range(50)], documents):
        expected = Encoder(tokenizer).encode(texts)
        assert all(map(np.array_equal, encoder.encode(texts), expected))
    assert encoder.differed == 0 and encoder.judged > len(documents) // JUDGE_EVERY


def test_every_character_of_the_used_planes_gets_the_same_ids(tokenizer: Tokenizer) -> None:
    numbers = [*range(0xD800), *range(0xE000, 0x30000), *range(0xE0000, 0xE0200), *range(0x30000, 0x110000, 16)]
    texts = ["".join(f"a{chr(i)}1 " for i in numbers[first : first + 512]) for first in range(0, len(numbers), 512)]
    fast = Gigatoken(tokenizer)
    expected = Encoder(tokenizer).encode(texts)
    assert all(np.array_equal(fast.encode(text), ids) for text, ids in zip(texts, expected, strict=True))


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_special_tokens_in_a_text_stay_text(tokenizer: Tokenizer, token: str) -> None:
    (ids,) = open_encoder(tokenizer).encode([f"a{token}b {token}"])
    assert ids.min() > PAD_ID and ids.tolist() == encode(tokenizer, f"a{token}b {token}")


def test_the_shards_are_the_same_bytes_by_both_encoders(sample: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    by = {}
    for name, encoder in (("fast", open_encoder(tokenizer)), ("judge", Encoder(tokenizer))):
        by[name] = write_shards(CONFIG, sample, encoder, tmp_path / name)
    assert shard_bytes(tmp_path / "fast") == shard_bytes(tmp_path / "judge")
    fast, judge = (by[name]["a"]["audit"]["train"] for name in ("fast", "judge"))
    assert fast["encoder"].startswith("gigatoken ") and judge["encoder"].startswith("tokenizers ")
    documents = by["fast"]["a"]["train"]["documents"]
    assert documents / JUDGE_EVERY <= fast["documents_judged"] < documents / JUDGE_EVERY + documents / 512 + 1
    assert fast["documents_differing"] == 0 and fast["round_trips"] == fast["documents_judged"]
    assert fast["bos"] == fast["eos"] == documents
    used = {int(i) for text in read_texts(sample / "a", "train") for i in encode(tokenizer, text)}
    assert fast["distinct_ids"] == len(used) + 2  # BOS and EOS
    for source in ("a", "b"):
        assert by["fast"][source]["train"] == by["judge"][source]["train"]


def test_one_difference_and_everything_is_written_again(
    sample: Path, folder: Path, changed: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """gigatoken was opened before the merges changed, so all that it writes differs from what `tokenizers` does."""
    opened_before = Encoder(changed, Gigatoken(load_tokenizer(folder)))
    with caplog.at_level(logging.WARNING):
        summary = write_shards(CONFIG, sample, opened_before, tmp_path / "found")
    assert "texts differently from tokenizers" in caplog.text and "tokenizers encodes everything" in caplog.text
    write_shards(CONFIG, sample, Encoder(changed), tmp_path / "expected")
    assert shard_bytes(tmp_path / "found") == shard_bytes(tmp_path / "expected")
    told = summary["b"]["audit"]["train"]
    assert told["encoder"].startswith("tokenizers ") and told["documents_differing"] > 0
    assert told["rejected"].startswith("gigatoken ") and told["documents_judged"] == 0


def test_a_difference_late_in_the_data_leaves_nothing_of_what_was_written_before(
    documents: list[str], folder: Path, tmp_path: Path
) -> None:
    """The encoders part on one word. In source a no document that has it is judged; in source b the first one is."""
    rare = ["Zzo " * 40] * 60
    for label, texts in (("a", [documents[0], *rare, *documents]), ("b", rare + documents)):
        write_sample_text(tmp_path / "sample" / label, texts, "train")
        write_sample_text(tmp_path / "sample" / label, documents[:20], "validation")
    record = json.loads((folder / "tokenizer.json").read_text())
    assert not any("Zz" in text for text in documents)
    record["model"]["vocab"]["Zz"] = len(record["model"]["vocab"])
    record["model"]["merges"].insert(0, ["Z", "z"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    judge, opened_before = load_tokenizer(tmp_path), Gigatoken(load_tokenizer(folder))

    encoder = Encoder(judge, opened_before)
    found = write_shards(CONFIG, tmp_path / "sample", encoder, tmp_path / "found")
    assert encoder.judged > len(documents) // JUDGE_EVERY  # source a passed, and was written
    assert found["a"]["audit"]["train"]["encoder"].startswith("tokenizers ")
    expected = write_shards(CONFIG, tmp_path / "sample", Encoder(judge), tmp_path / "expected")
    assert found["a"]["train"] == expected["a"]["train"]
    assert shard_bytes(tmp_path / "found") == shard_bytes(tmp_path / "expected")

    plan, made = StageSpec("shards", 1, {}, {}), []
    for store in (Store(str(tmp_path / "store")), Store(f"memory://{tmp_path.name}")):
        encoder = Encoder(judge, opened_before)
        sending = EarlyUpload(store, plan, ShardDescriber)

        def produce(out: Path, encoder: Encoder = encoder, store: Store = store, sending: EarlyUpload = sending) -> Any:
            slices = None if store.is_local else ResumableUpload(out.parent, sending)
            return write_shards(CONFIG, tmp_path / "sample", encoder, out, slices=slices)

        made.append(build(store, plan, produce, str(tmp_path / "work"), ShardDescriber(), sending)[0])
    used = {made[1].key(name) for name in made[1].manifest["files"]}
    assert set(made[1].store.files("")) == used | {f"shards/{plan.fingerprint}/{MANIFEST}"}
    made[1].verify()
    for file in made[1].manifest["files"].values():
        file.pop("place", None)  # where the first, wrong one had taken the name
    assert made[0].manifest["files"] == made[1].manifest["files"]


def test_a_tokenizer_that_only_tokenizers_knows_is_encoded_by_it(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.encode_special_tokens = True
    other.add_tokens([AddedToken("otter")])  # no special token: it is one wherever it stands
    encoder = open_encoder(other)
    assert encoder.name.startswith("tokenizers ") and "differently from tokenizers" in str(encoder.rejected)
    home_made = json.loads(tokenizer.to_str())
    home_made["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "[aeiou]+|."},
        "behavior": "Isolated",
        "invert": False,
    }
    encoder = open_encoder(Tokenizer.from_str(json.dumps(home_made)))
    assert encoder.name.startswith("tokenizers ") and "does not support this tokenizer" in str(encoder.rejected)


def test_half_a_surrogate_pair_is_refused_as_without_a_fast_encoder(tokenizer: Tokenizer) -> None:
    for encoder in (open_encoder(tokenizer), Encoder(tokenizer)):
        with pytest.raises(TypeError, match="TextEncodeInput"):
            encoder.encode(["fine", "a\ud800b"])


def test_gigatoken_forgets_its_words(
    tokenizer: Tokenizer, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vectorclm.shards.encoder.REOPEN_CHARACTERS", 1000)
    fast = Gigatoken(tokenizer)
    first = fast._tokenizer
    assert [fast.encode(text).tolist() for text in documents[:20]] == [encode(tokenizer, t) for t in documents[:20]]
    assert fast._tokenizer is not first and fast._characters < 1000 + max(map(len, documents))


def test_the_audit_finds_what_is_broken(
    sample: Path, documents: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_shards(CONFIG, sample, tokenizer, tmp_path)
    stored = [shard.input_ids for shard in read_windows(tmp_path / "a", "train")]
    size, lengths = sum(len(text.encode()) for text in documents), token_lengths(tokenizer)

    def judged(shards: list[np.ndarray]) -> np.ndarray:
        return audit(shards, len(documents), size, lengths, "a/train")

    counts = judged(stored)
    assert counts[BOS_ID] == counts[EOS_ID] == len(documents) and counts.sum() == sum(map(np.size, stored))
    first, second = stored[0], stored[1]
    row, column = next((r, c) for r in range(9) for c in range(5, 31) if (second[r, c - 1 : c + 2] > PAD_ID).all())
    for value, message in (
        (400, "a/train: the id 400 is outside the vocabulary of 400 tokens"),
        (BOS_ID, "a BOS does not follow the EOS of the previous document"),
        (EOS_ID, rf"{len(documents)} BOS, {len(documents) + 1} EOS"),
        (PAD_ID, "padding before the end of a window"),
        (PAD_ID - 1, "1 other special tokens"),
        (next(i for i in range(5, 400) if lengths[i] != lengths[second[row, column]]), "but their tokens"),
    ):
        broken = second.copy()
        broken[row, column] = value
        with pytest.raises(CorruptArtifactError, match=message):
            judged([first, broken, *stored[2:]])
    with pytest.raises(CorruptArtifactError, match=r"BOS, \d+ EOS"):
        judged([first, *stored[2:]])  # a shard is missing


def test_a_tokenizer_that_loses_text_is_refused(sample: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    lossy = Tokenizer.from_str(tokenizer.to_str())
    lossy.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match=r"a/train: the tokenizer does not decode a document to itself: '.*' becomes '"):
        write_shards(CONFIG, sample, lossy, tmp_path)
    ids = [np.array(encode(tokenizer, text)) for text in ("one", "two")]
    assert check_round_trip(tokenizer, ["one", "two"], ids, "a") == 2
