"""`vectorclm bench gguf`: whether llama.cpp computes the same model from the GGUF files of `vectorclm export`."""

import random
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from vectorclm.bench.table import Row, bounded, compared
from vectorclm.config import changed, load_experiment
from vectorclm.corpus.sample_reader import read_texts
from vectorclm.evaluation.bits_per_byte import text_scores
from vectorclm.export.gguf import GGUF_TYPES, export_gguf
from vectorclm.export.llama_cpp import LlamaCpp
from vectorclm.inference.generate import generate
from vectorclm.lineage.pinning import pin
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.shards.config import SPLITS
from vectorclm.shards.encoder import SPACES, adversarial
from vectorclm.stages import plans, run_stage
from vectorclm.store.artifact import Store
from vectorclm.store.model_ref import find_model
from vectorclm.tokenizer import BOS_ID, EOS_ID, IM_END_ID, SPECIAL_TOKENS, encode, load_tokenizer

NEAR_TIE = 1e-4  # logits this close may swap through the order of a sum
DOCUMENTS, TEXT_BYTES = 10_000, 60_000_000  # documents that both tokenize, from a sample of this size
HARD_STRINGS = 1_000
PROMPTS, PROMPT, CONTINUATION = 24, 32, 64  # number of prompts, tokens of each, and tokens compared after each
SCORED = 2_000  # maximum characters of each held-out document
# Bounds on llama.cpp's bits per byte over ours: fp32 sums in another order, f16 and q8_0 round the weights.
ASKED = {"f32": 1.0001, "f16": 1.001, "q8_0": 1.01}


@dataclass(frozen=True)
class Tie:
    """A difference in greedy tokens between llama.cpp and this model."""

    prompt: int
    token: int  # position in the continuation
    gap: float  # between our logits of both tokens

    @property
    def near(self) -> bool:
        """Whether rounding explains the difference."""
        return self.gap < NEAR_TIE


def same_model(address: str, data: Path | None) -> Iterator[Row]:
    """Compare token ids, continuations and bits per byte of a model's GGUF files, of a mirror or generated text."""
    found = find_model(address)
    folder, device = found.local(), torch.device("cpu")  # full fp32, as in llama.cpp
    model, tokenizer = CausalLM.from_pretrained(folder).eval(), load_tokenizer(folder)
    with temporary_folder("bench-") as place:
        train, held_out = _documents(place, data)
        files = {kind: export_gguf(found, kind, place / f"{kind}.gguf") for kind in GGUF_TYPES}
        judges = {kind: LlamaCpp(file, torch.get_num_threads()) for kind, file in files.items()}
        hard = list(hard_strings(tokenizer))
        for name, texts in (("documents", train), ("hard strings", hard)):
            count = len(differing(judges["f32"], tokenizer, texts))
            yield bounded(f"{name} with other ids", [count], "texts", 0, f"{len(texts):,} compared")
        prompts = [[BOS_ID, *encode(tokenizer, text)[: PROMPT - 1]] for text in held_out]
        ties = list(greedy_differences(model, judges["f32"], prompts, CONTINUATION))
        near = [f"prompt {tie.prompt} token {tie.token}: {tie.gap:.1e}" for tie in ties if tie.near]
        note = f"{len(prompts)} prompts, {CONTINUATION} tokens each; near-ties: {', '.join(near) or 'none'}"
        yield bounded("greedy tokens otherwise", [len(ties) - len(near)], "tokens", 0, note)
        text = "\n\n".join(text[:SCORED] for text in held_out)
        ours = text_scores(model, tokenizer, text, device, judges["f32"].longest)["bits_per_byte"]
        for kind, judge in judges.items():
            theirs = judge.text_scores(text)["bits_per_byte"]
            row = compared(
                f"{kind}: llama.cpp's bits per byte over ours", [theirs], [ours], "bits", ask=ASKED[kind], most=True
            )
            yield replace(row, why=f"{theirs:.5f}, ours {ours:.5f}; a file of {files[kind].stat().st_size:,} bytes")


def _documents(folder: Path, data: Path | None) -> tuple[list[str], list[str]]:
    """Training documents and held-out documents of all sources."""
    experiment, path = load_experiment("tiny" if data is None else "small")
    experiment = changed(experiment, {"sample.bytes": TEXT_BYTES})
    experiment, _ = pin(experiment, folder / path.name, data, resolve=True)
    store = Store(str(folder / "store"))
    run_stage("sample", experiment, store, Runtime(), data)
    sample = folder / "store" / "sample" / plans(experiment)["sample"].fingerprint
    sources = sorted(path for path in sample.iterdir() if path.is_dir())
    train, held_out = ([text for source in sources for text in read_texts(source, split)] for split in SPLITS)
    return spread(train, DOCUMENTS), spread(held_out, PROMPTS)


def spread(texts: Sequence[str], count: int) -> list[str]:
    """`count` texts at equal distances in the list, or all of a shorter list."""
    return [texts[i * len(texts) // count] for i in range(count)] if len(texts) > count else list(texts)


def hard_strings(tokenizer: Tokenizer, count: int = HARD_STRINGS) -> Iterator[str]:
    """At least `count` texts on which tokenizers differ: those of `adversarial`, then random characters.

    The random characters have every Unicode category equally often, besides digits, spaces, line ends and special
    tokens.
    """
    for text in adversarial(tokenizer):
        count -= 1
        yield text
    rng = random.Random(0)
    categories: dict[str, list[str]] = {}
    for character in map(chr, range(sys.maxunicode + 1)):
        categories.setdefault(unicodedata.category(character), []).append(character)
    del categories["Cs"]  # a lone surrogate is not text
    pieces = (
        lambda: rng.choice(categories[rng.choice(list(categories))]) * rng.randrange(1, 4),
        lambda: str(rng.randrange(10 ** rng.randrange(1, 40))),
        lambda: rng.choice((*SPACES, "\r", "\n\n")) * rng.randrange(1, 9),
        lambda: rng.choice(("'s", "'ll", "'", "n't", "\x00", "e\u0301", "👩‍👩‍👧", "日本", *SPECIAL_TOKENS)),
        lambda: "".join(rng.choices("aeiou stn", k=rng.randrange(1, 12))),
    )
    for _ in range(count):
        yield "".join(rng.choice(pieces)() for _ in range(rng.randrange(1, 200)))


def differing(judge: LlamaCpp, tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The texts that llama.cpp and `tokenizers` tokenize differently, with special tokens taken as plain text."""
    return [text for text in texts if judge.tokenize(text) != encode(tokenizer, text)]


def greedy_differences(model: CausalLM, judge: LlamaCpp, prompts: Sequence[Sequence[int]], count: int) -> Iterator[Tie]:
    """Differences between llama.cpp's greedy tokens and ours; after each, llama.cpp continues from our token."""
    for number, prompt in enumerate(prompts):
        ours = list(generate(model, prompt, count, stop_ids=(EOS_ID, IM_END_ID)))
        at = 0
        while at < len(ours) and (theirs := judge.greedy([*prompt, *ours[:at]], len(ours) - at)):
            pairs = enumerate(zip(ours[at:], theirs, strict=False))
            same = next((i for i, (mine, other) in pairs if mine != other), len(theirs))
            at += same
            if same < len(theirs):
                with torch.inference_mode():
                    logits_V = model(torch.tensor([[*prompt, *ours[:at]]]))[0, -1]
                yield Tie(number, at, float(logits_V[ours[at]] - logits_V[theirs[same]]))
                at += 1
