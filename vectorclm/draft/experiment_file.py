"""Writes a chosen experiment as a commented TOML file."""

import json
from pathlib import Path

from vectorclm.draft.choice import Choice
from vectorclm.draft.survey import ChatSurvey, TextSurvey, relative

SEED = 1


def experiment_file(name: str, choice: Choice, folder: Path) -> str:
    """The text of the experiment file, with paths relative to `folder`."""
    parts = [_head(name, choice), _sample(choice, folder), _model(choice), _pretrain(choice)]
    if choice.chats:
        parts.append(_chat(choice, folder))
    return "\n".join([*parts, _evaluate(choice)])


def _text(value: str) -> str:
    """A TOML string; JSON's escapes are TOML's, except those of surrogate pairs, which are written as they are."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _files(survey: TextSurvey | ChatSurvey, folder: Path) -> list[str]:
    source = survey.source
    if source.data_files is None:
        return [f"path = {_text(relative(source.path, folder))}"]
    files = relative(str(source.data_files), folder)
    return [f"path = {_text(source.path)}", f"data_files = {_text(files)}"]


def _head(name: str, choice: Choice) -> str:
    kind = "then chats" if choice.chats else "and ends at the base model"
    return f"""\
# {name}: learns from {choice.bytes / 1e6:,.1f} MB of text {kind}, in about {choice.minutes:g} min on this machine.
# `vectorclm run {name}.toml` trains it; with --dry-run it shows what it will do.
# Paths are relative to this file.
name = "{name}"
seed = {SEED}
"""


def _sample(choice: Choice, folder: Path) -> str:
    lines = [
        "[sample]",
        f"bytes = {choice.drawn:_} # UTF-8 bytes to draw from all sources, by weight",
        f"validation_share = {choice.validation_share:.6f} # held out: the smallest share that is enough",
    ]
    for text in choice.texts:
        column = text.source.text_column
        about = {"text": "", "part": "a document is a blank-line-separated part"}.get(column, "")
        lines += [
            "",
            "[[sample.sources]]",
            f'label = "{text.label}" # {text.documents:,} documents, {text.script} script',
            *_files(text, folder),
            f"text_column = {_text(column)}" + (f" # {about}" if about else ""),
            f"weight = {max(0.001, round(text.bytes / 1e6, 3))}",
        ]
    vocabulary = choice.model.vocab_size
    return (
        "\n".join(lines)
        + f"""

[tokenizer]
vocab_size = {vocabulary} # {choice.bytes_per_token:.2f} bytes a token on this text
bytes = {min(choice.drawn, 20_000_000):_}

[shards]
sequence_length = {choice.length} # tokens in a window
packing = "{"concatenate" if _is_short(choice) else "best_fit"}"
"""
    )


def _is_short(choice: Choice) -> bool:
    """Whether typical documents are much shorter than a window."""
    return max(text.median_bytes for text in choice.texts) / choice.bytes_per_token < choice.length / 2


def _model(choice: Choice) -> str:
    model = choice.model
    fields = "\n".join(
        f"{key} = {getattr(model, key)}"
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        )
    )
    return f"[model] # {model.parameters:,} parameters\n{fields}\n"


def _pretrain(choice: Choice) -> str:
    steps = choice.tokens // (choice.batch * choice.length)
    interval = max(10, steps // 10)
    rate = {128: 0.02, 192: 0.015}.get(choice.model.hidden_size, 0.012)
    return f"""\
[pretrain]
batch_size = {choice.batch} # windows in a step
document_mask = {"false" if _is_short(choice) else "true"} # whether a token sees only its own document
validation_interval = {interval} # steps
validation_windows = 32
optimizer = {{ learning_rate = {rate}, adamw_learning_rate = 0.006 }}
schedule = {{ kind = "cosine", warmup = 0.03, floor = 0.05 }}

[[pretrain.phases]]
tokens = {choice.tokens:_} # {choice.epochs:.1f} passes over the text, at {choice.speed:,.0f} tokens a second here
"""


def _chat(choice: Choice, folder: Path) -> str:
    lines = [
        "[chat]",
        f"sequence_length = {choice.length}",
        "validation_share = 0.05",
        'malformed = "drop" # count and leave out what is no conversation',
    ]
    for number, chat in enumerate(choice.chats, 1):
        lines += [
            "",
            "[[chat.sources]]",
            f'label = "chat-{number}"',
            *_files(chat, folder),
            f"column = {_text(chat.source.column)}",
            f"conversations = {max(1, round(chat.conversations * choice.chat_share)):_} # of {chat.conversations:,}",
        ]
    return (
        "\n".join(lines)
        + f"""

[finetune]
epochs = {choice.chat_epochs} # passes over the conversations
batch_size = {choice.chat_batch}
validation_interval = 25
validation_windows = 32
optimizer = {{ learning_rate = 0.004, adamw_learning_rate = 0.002 }}
schedule = {{ kind = "cosine", warmup = 0.05, floor = 0.05 }}
"""
    )


def _evaluate(choice: Choice) -> str:
    questions = [question for chat in choice.chats for question in chat.questions]
    starts = [" ".join(text.split()[:6]) for survey in choice.texts for text in survey.texts[:6] if text.strip()]
    prompts = [prompt[:200] for prompt in (questions or starts)[:3]]
    return f"""\
[evaluate]
prompts = [{", ".join(map(_text, prompts))}]
chat_prompts = 50
max_new_tokens = {min(96, choice.length // 2)}
"""
