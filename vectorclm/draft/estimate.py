"""Estimate what an experiment reads, how often, and how long each stage takes on this machine.

First the work of each stage is counted, in the units that the summaries of its artifact count, too; then it is divided
by the speed of this machine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vectorclm.config import ExperimentConfig
from vectorclm.draft.look import ChatLook, TaskLook, TextLook, look_at_chat, look_at_task, look_at_text
from vectorclm.draft.speed import MachineSpeed, Training, machine_speed
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import stages_of
from vectorclm.train_tokenizer import bytes_per_token, usual_bytes_per_token

LEARNT = 50_000  # characters of text from which a vocabulary is learned, at least
LEARNABLE = 4096  # tokens; a larger vocabulary needs more text than a look
PROMPT_BYTES, SHOTS_BYTES = 120, 900  # of an instruction, and of the examples before it for a base model
ENDED = 0.65  # share of the longest answer that a base model's answer to an instruction takes, about
CHAT_PROMPT = 0.5  # share of a conversation that comes before the first answer

# Of the machine of speed.PLAIN_SECONDS, at rest: amounts per second, and seconds.
READ, DRAWN, GENERATED = 90e6, 90e6, 12_000.0  # bytes that are read and written by `sample`; generated documents
LEARNED, MERGES = 10e6, 0.0003  # bytes of text on two cores; seconds for each token of the vocabulary
ENCODED, RENDERED = 50e6, 1.3e6  # bytes of documents on two cores, and of conversations
HARNESS, ASKED = 6.0, 1500.0  # seconds to load the harness; questions that are prepared
STARTED, BEGUN, SAVED = 2.5, 0.2, 1.0  # seconds of a process with torch, of any stage, and of the last checkpoint
AROUND = 12.0  # seconds for Prefect and MLflow around the stages


@dataclass(frozen=True)
class Estimate:
    """What an experiment reads and does, and how long that takes here."""

    available: Mapping[str, int | None]  # bytes of text by source; None = unknown before it is read
    drawn: int  # bytes
    epochs: float  # passes over the text
    speed: MachineSpeed
    work: Mapping[str, Mapping[str, float]]  # amounts by stage
    seconds: Mapping[str, float]  # by stage
    around: float  # seconds before, between and after the stages


def estimate(experiment: ExperimentConfig, data: Path | None, runtime: Runtime) -> Estimate:
    """Estimate an experiment by a look at its sources and a few seconds of measurement; nothing is downloaded."""
    looks = _Looks(experiment, data)
    work = count_work(experiment, looks)
    training = Training(
        experiment.shards.sequence_length,
        experiment.pretrain.batch_size,
        looks.document_tokens if experiment.pretrain.document_mask else None,
    )
    speed = machine_speed(experiment.model, training, runtime)
    seconds: dict[str, float] = {
        stage.name: _seconds(stage.name, work[stage.name], speed) for stage in stages_of(experiment)
    }
    trained = experiment.pretrain.tokens * looks.per_token
    epochs = trained / max(1.0, looks.drawn * (1 - experiment.sample.validation_share))
    around = AROUND / speed.plain
    return Estimate(looks.available, looks.drawn, epochs, speed, work, seconds, around)


class _Looks:
    """What the sources of an experiment hold."""

    def __init__(self, experiment: ExperimentConfig, data: Path | None) -> None:
        world, sample = experiment.world, experiment.sample
        self.texts = {source.label: look_at_text(source, data, world) for source in sample.sources}
        self.chats: dict[str, ChatLook] = {
            source.label: look_at_chat(source, data, world) for source in experiment.chat_sources
        }
        self.tasks: dict[str, TaskLook] = {
            task.label: look_at_task(task, data, world) for task in experiment.evaluate.tasks
        }
        self.available = {label: look.bytes for label, look in self.texts.items()}
        total = sum(source.weight for source in sample.sources)
        shares = {source.label: sample.bytes * source.weight / total for source in sample.sources}
        self.drawn_of = {
            label: share if (size := self.available[label]) is None else min(share, size)
            for label, share in shares.items()
        }
        self.drawn = round(sum(self.drawn_of.values()))
        self.per_token = _per_token(experiment.model.vocab_size, list(self.texts.values()))
        documents = sum(self.drawn_of[label] / look.document_bytes for label, look in self.texts.items())
        self.documents = max(1.0, documents)
        self.document_tokens = max(2, round(self.drawn / self.documents / self.per_token) + 2)


def _per_token(vocabulary: int, looks: list[TextLook]) -> float:
    """Bytes of text for each token: learned from the text for a small vocabulary, else by experience."""
    texts = [text for look in looks for text in look.texts]
    letters = sum(map(len, texts))
    if vocabulary <= LEARNABLE and letters >= LEARNT:
        return bytes_per_token(texts, vocabulary)
    return usual_bytes_per_token(vocabulary) * (sum(len(text.encode()) for text in texts) / letters if letters else 1.0)


def count_work(experiment: ExperimentConfig, looks: _Looks) -> dict[str, dict[str, float]]:
    """The amounts of each stage of an experiment, in the units of the summaries of its artifact."""
    questions = experiment.evaluate
    read = sum(looks.drawn_of[label] if look.bytes is None else look.bytes for label, look in looks.texts.items())
    tokens = looks.drawn / looks.per_token + 2 * looks.documents
    held_out = experiment.held_out_tokens(tokens)
    items: dict[str, float] = {"items": sum(task.items for task in looks.tasks.values())}
    items["item_tokens"] = sum(task.items * task.bytes for task in looks.tasks.values()) / looks.per_token
    items["harness"] = sum(task.task is not None for task in questions.tasks)
    longest = min(questions.max_new_tokens, experiment.model.max_position_embeddings // 2)
    of_base = {
        "answer_tokens": (len(questions.prompts) + ENDED * questions.instructions) * longest,
        "prompt_tokens": questions.instructions * (PROMPT_BYTES + SHOTS_BYTES) / looks.per_token,
    }
    work: dict[str, dict[str, float]] = {
        "sample": {
            "read": read,
            "bytes": looks.drawn,
            "generated": sum(look.generated for look in looks.texts.values()),
        },
        "tokenizer": {
            "bytes": min(experiment.tokenizer.bytes, looks.drawn),
            "vocab_size": experiment.tokenizer.vocab_size,
        },
        "shards": {"bytes": looks.drawn, "tokens": tokens},
        "pretrain": experiment.pretraining_work(tokens)._asdict(),
        "evaluate_base": {"text_tokens": held_out, **items, **of_base},
        "export": {},
    }
    if experiment.chat is not None:
        work |= _chat_work(experiment, looks, {"text_tokens": held_out, **items})
    return work


def _chat_work(experiment: ExperimentConfig, looks: _Looks, scored: Mapping[str, float]) -> dict[str, dict[str, float]]:
    chat, finetune, questions = experiment.chat, experiment.finetune, experiment.evaluate
    assert chat is not None and finetune is not None
    counts, tokens, size = dict[str, float](), 0.0, 0.0
    for source in chat.sources:
        look = looks.chats[source.label]
        there = source.conversations if look.conversations is None else look.conversations
        counts[source.label] = float(min(source.conversations, there))
        budget = chat.budget(source)
        each = min(look.bytes / looks.per_token, chat.sequence_length)
        if budget is not None:
            counts[source.label] = min(counts[source.label], budget / max(1.0, each * (1 - chat.validation_share)))
        tokens += counts[source.label] * each
        size += counts[source.label] * look.bytes
    read = sum(counts.values())
    trained = tokens * (1 - chat.validation_share) / chat.sequence_length / (1 - finetune.replay)
    longest = min(questions.max_new_tokens, experiment.model.max_position_embeddings // 2)
    answers = [size for look in looks.chats.values() for size in look.answers]
    answer = sum(min(longest, size / looks.per_token + 1) for size in answers) / max(1, len(answers))
    asked = min(questions.chat_prompts, read * chat.validation_share)
    prompts = asked * CHAT_PROMPT * tokens / max(1.0, read) + questions.instructions * PROMPT_BYTES / looks.per_token
    held_out = tokens * chat.validation_share + (scored["text_tokens"] if finetune.replay else 0)
    sources = len(chat.sources) + (len(looks.texts) if finetune.replay else 0)
    return {
        "chat_shards": {"conversations": read, "bytes": size, "tokens": tokens},
        "finetune": finetune.work(finetune.epochs * trained, chat.sequence_length, held_out, sources)._asdict(),
        "evaluate": {
            **scored,
            "answer_tokens": (asked + len(questions.prompts) + questions.instructions) * answer,
            "prompt_tokens": prompts,
        },
    }


def _seconds(stage: str, work: Mapping[str, float], speed: MachineSpeed) -> float:
    """The time of a stage; the constants are those of a machine whose `plain` speed is 1."""
    plain = speed.plain
    match stage:
        case "sample":
            return (BEGUN + work["read"] / READ + work["bytes"] / DRAWN + work["generated"] / GENERATED) / plain
        case "tokenizer":
            return (BEGUN + work["bytes"] / LEARNED + work["vocab_size"] * MERGES) / plain
        case "shards":
            return (BEGUN + work["bytes"] / ENCODED) / plain
        case "chat_shards":
            return (BEGUN + work["bytes"] / RENDERED) / plain
        case "pretrain" | "finetune":
            read = work["validation_tokens"] / speed.reading + work["sample_tokens"] / speed.writing
            return (STARTED + SAVED) / plain + work["tokens"] / speed.training + read
        case "evaluate_base" | "evaluate":
            asked = work["items"] / ASKED + HARNESS * (work["harness"] > 0)
            read = (work["text_tokens"] + work["item_tokens"] + work["prompt_tokens"]) / speed.reading
            return (STARTED + asked) / plain + read + work["answer_tokens"] / speed.writing
        case _:
            return BEGUN / plain
