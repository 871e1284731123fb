"""Choose vocabulary, shape, budgets and splits that fit the text, the machine and the minutes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from vectorclm.draft.survey import ChatSurvey, TextSurvey
from vectorclm.errors import ConfigError
from vectorclm.model_config import ModelConfig
from vectorclm.train_tokenizer import cut_long_words, learn, may_have_long_words

LEAST_BYTES = 200_000  # of text, below which no model learns more than its words
LEAST_CONVERSATIONS = 50
LEAST_MINUTES = 1.0
VOCABULARIES = ((1_000_000, 1024), (4_000_000, 2048), (16_000_000, 4096), (80_000_000, 8192))  # by bytes of text
LARGEST_VOCABULARY = 16_384
SHAPES = (  # hidden size, layers, heads, key/value heads, intermediate size
    (128, 4, 4, 2, 352),
    (192, 5, 6, 3, 512),
    (256, 6, 8, 4, 704),
    (384, 8, 6, 3, 1024),
    (512, 10, 8, 4, 1408),
    (768, 12, 12, 4, 2048),
)
LEAST_STEPS = 100
EPOCHS = 8.0  # passes over the text, beyond which a model learns it by heart
TOKENS_EACH = 12.0  # training tokens a parameter of the layers, at least; of several passes, each counts
PRETRAINING = {False: 0.85, True: 0.6}  # share of the minutes, without and with conversations
FINETUNING = 0.25
HELD_OUT_SHARE, HELD_OUT_BYTES = 0.01, 16_000  # of each source, at least
FINETUNE_EPOCHS = 3.0
BYTES_PER_MERGE = 600  # text that the tokenizer needs for each of its tokens


@dataclass(frozen=True)
class Choice:
    """The settings that were chosen, and the figures behind them."""

    texts: Sequence[TextSurvey]
    chats: Sequence[ChatSurvey]
    minutes: float
    model: ModelConfig
    length: int
    bytes_per_token: float
    speed: float  # tokens per second of this machine with this model
    tokens: int
    batch: int  # windows in a step
    validation_share: float
    chat_batch: int = 8

    @cached_property
    def bytes(self) -> int:
        """The size of the distinct documents."""
        return sum(text.bytes for text in self.texts)

    @property
    def drawn(self) -> int:
        """The bytes to draw: all, or as much as the training reads once."""
        needed = int(self.tokens * self.bytes_per_token * 1.3)
        whole = all(text.whole for text in self.texts)
        if whole and needed > self.bytes * 0.8:
            return int(self.bytes * 1.02) + 1
        return min(self.bytes, max(LEAST_BYTES, needed, self.model.vocab_size * BYTES_PER_MERGE))

    @property
    def epochs(self) -> float:
        """How often the training reads the text."""
        return self.tokens * self.bytes_per_token / max(1, min(self.drawn, self.bytes) * (1 - self.validation_share))

    @property
    def chat_share(self) -> float:
        """The share of the conversations that the minutes allow to read once, and a few steps at least."""
        tokens = sum(chat.bytes for chat in self.chats) / self.bytes_per_token
        least = 20 * self.chat_batch * self.length
        return min(1.0, max(least, self.minutes * 60 * FINETUNING * self.speed) / max(1.0, tokens))

    @property
    def chat_tokens(self) -> int:
        """Tokens of the conversations that are drawn, about."""
        return int(self.chat_share * sum(chat.bytes for chat in self.chats) / self.bytes_per_token)

    @property
    def chat_epochs(self) -> float:
        """Passes over the conversations: what the minutes allow, and two steps at least."""
        affordable = self.minutes * 60 * FINETUNING * self.speed / max(1, self.chat_tokens)
        least = 2 * self.chat_batch * self.length / max(1, self.chat_tokens)
        return round(max(1.0, least, min(FINETUNE_EPOCHS, affordable)), 2)


def choose(
    texts: Sequence[TextSurvey], chats: Sequence[ChatSurvey], minutes: float, speed: Callable[[ModelConfig, int], float]
) -> Choice:
    """Choose the settings; `speed` measures the tokens per second of a model with a window length.

    Raises ConfigError where the text, the conversations or the minutes are too few.
    """
    size = sum(text.bytes for text in texts)
    documents = sum(text.documents for text in texts)
    if size < LEAST_BYTES:
        raise ConfigError(
            f"the text has {size / 1000:,.0f} kB in {documents:,} distinct documents: a model needs 200 kB at least, "
            "so add text"
        )
    if minutes < LEAST_MINUTES:
        raise ConfigError(f"--minutes {minutes:g}: a training needs {LEAST_MINUTES:g} minute at least")
    if chats and (count := sum(chat.conversations for chat in chats)) < LEAST_CONVERSATIONS:
        raise ConfigError(f"{count} conversations are too few: {LEAST_CONVERSATIONS} are needed, or leave out --chat")
    vocabulary, bytes_per_token = _vocabulary(texts, size)
    typical = max(text.median_bytes for text in texts) / bytes_per_token
    model, length, rate, tokens = _shape(vocabulary, size / bytes_per_token, typical, minutes, bool(chats), speed)
    batch = next(n for n in (8, 16, 32, 64, 128, 10**9) if n == 128 or n * length * 1500 >= tokens)
    tokens = max(tokens, LEAST_STEPS * batch * length)
    share = max(_held_out(text) for text in texts)
    return Choice(texts, chats, minutes, model, length, bytes_per_token, rate, tokens, batch, share)


def _vocabulary(texts: Sequence[TextSurvey], size: int) -> tuple[int, float]:
    """The size of the vocabulary that the text yields, and its bytes per token."""
    wanted = next((tokens for limit, tokens in VOCABULARIES if size < limit), LARGEST_VOCABULARY)
    sample = [text for source in texts for text in source.texts]
    sample = [cut_long_words(text, Counter()) if may_have_long_words(text) else text for text in sample]
    tokenizer = learn(sample, wanted)
    encoded = tokenizer.encode_batch_fast(sample[:500], add_special_tokens=False)
    count = sum(len(item.ids) for item in encoded)
    got = tokenizer.get_vocab_size()
    if got < wanted:  # a sample of a source may yield less than the part that was read here
        got = max(300, got * 9 // 10)
    return got, max(1.0, sum(len(text.encode()) for text in sample[:500]) / max(1, count))


def _shape(
    vocabulary: int,
    unique: float,
    typical: float,
    minutes: float,
    chat: bool,
    speed: Callable[[ModelConfig, int], float],
) -> tuple[ModelConfig, int, float, int]:
    """The largest model that text and minutes can train; with its window, its speed and its tokens."""
    seconds = minutes * 60 * PRETRAINING[chat]
    chosen: tuple[ModelConfig, int, float, int] | None = None
    for shape in SHAPES:
        length = 128 if shape[0] < 192 and typical < 300 and not chat else 256 if shape[0] < 384 else 512
        model = model_of(vocabulary, length, shape)
        layers = model.parameters - vocabulary * model.hidden_size
        if chosen is not None and EPOCHS * unique < TOKENS_EACH * layers / 4:
            break
        rate = speed(model, length)
        tokens = int(min(EPOCHS * unique, rate * seconds))
        if chosen is not None and tokens < TOKENS_EACH * layers:
            break
        chosen = model, length, rate, tokens
    assert chosen is not None
    return chosen


def model_of(vocabulary: int, length: int, shape: tuple[int, int, int, int, int]) -> ModelConfig:
    """The model of a shape in SHAPES."""
    hidden, layers, heads, groups, inner = shape
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=hidden // heads,
        max_position_embeddings=length,
    )


def _held_out(text: TextSurvey) -> float:
    """The smallest share of documents whose hashes hold out enough text of a source, and a document at least."""
    wanted = max(HELD_OUT_SHARE * text.bytes, min(HELD_OUT_BYTES, 0.1 * text.bytes))
    held, ranks = 0, sorted(text.ranks)
    for number, (rank, size) in enumerate(ranks):
        held += size
        share = (rank + 1) / 2**64
        if held >= wanted or share > 0.3 or number + 2 >= len(ranks):
            break
    if len(ranks) < 2 or share >= 0.49:
        raise ConfigError(
            f"{text.place} has {len(ranks):,} documents, and training and validation need different ones: split it "
            "into more files or rows"
        )
    return float(f"{min(0.49, share * 1.001 + 1e-6):.6f}")
