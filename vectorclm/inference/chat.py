"""Chat with a model: shorten conversations, stream answers as text, chat in the terminal."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from vectorclm.command_line import printable
from vectorclm.errors import DataError
from vectorclm.inference.config import GREEDY, SamplingParams
from vectorclm.inference.generate import drop_oldest, generate
from vectorclm.inference.grammar import GrammarCompiler
from vectorclm.inference.load import open_model
from vectorclm.inference.logprobs import TokenNames
from vectorclm.inference.text_stream import SPECIAL, TextDelta, TextStream
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.conversations import Turn, read_conversation, render_prompt
from vectorclm.store.model_ref import Model, find_model
from vectorclm.tokenizer import EOS_ID, IM_END_ID

HELP = """/reset          start a new conversation with the same system prompt
/system TEXT    start a new conversation with this system prompt; without TEXT, with none
/exit           leave the chat; exit, quit and Ctrl-D do so, too
Ctrl-C          stop the answer, or leave the chat"""
LEAVE = ("/exit", "/quit", "exit", "quit")


@dataclass(frozen=True)
class LanguageModel:
    """A model in memory, ready to answer or to continue a text."""

    model: CausalLM
    tokenizer: Tokenizer
    content: str  # SHA-256 over the model's files
    chat: bool = True  # whether the model answers in the chat template

    @property
    def context(self) -> int:
        """The longest conversation with its answer, in tokens."""
        return self.model.config.max_position_embeddings

    @cached_property
    def names(self) -> TokenNames:
        """The texts of the tokens."""
        return TokenNames(self.tokenizer)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """The compiler of JSON schemas for the tokenizer."""
        return GrammarCompiler(self.tokenizer, [IM_END_ID, EOS_ID] if self.chat else [EOS_ID])


def open_chat_model(address: str, runtime: Runtime) -> LanguageModel:
    """Load the chat model at an address as `open_language_model` does. Raises DataError also for a base model."""
    found = find_model(address)
    if not found.chat:
        raise DataError(
            f"{address} is a base model, which never ends a turn: name a chat model, such as one of `finetune`"
        )
    return _load(found, address, runtime)


def open_language_model(address: str, runtime: Runtime) -> LanguageModel:
    """Load the model at an address that `find_model` knows, on this runtime's device.

    Raises what `find_model` does, and DataError where the tokenizer is another model's.
    """
    return _load(find_model(address), address, runtime)


def _load(found: Model, address: str, runtime: Runtime) -> LanguageModel:
    runtime.check()
    device, folder = runtime.configure_torch(), found.local()
    model, tokenizer = open_model(folder, address)
    return LanguageModel(model.to(device), tokenizer, found.content, found.chat)


def check_turns(turns: Sequence[Turn]) -> None:
    """Check the order of roles: at most one system turn, then user and assistant alternate, and the user is last.

    Raises DataError for another order, and for an empty message.
    """
    first = 1 if turns and turns[0].role == "system" else 0
    for place, turn in enumerate(turns[first:], first):
        expected = "assistant" if (place - first) % 2 else "user"
        if turn.role != expected:
            raise DataError(
                f"message {place} is the {turn.role}'s where the {expected}'s is due: after at most one system "
                "message, user and assistant alternate, the user first"
            )
    if (len(turns) - first) % 2 == 0:
        raise DataError("the last message must be the user's, because the model answers it")
    for place, turn in enumerate(turns):
        if turn.role != "assistant" and not turn.content.strip():  # an answer may be empty
            raise DataError(f"message {place} is empty")


def fit_turns(tokenizer: Tokenizer, turns: Sequence[Turn], length: int) -> list[Turn]:
    """Shorten a conversation to a prompt of at most `length` tokens: drop the oldest questions and their answers.

    The system turn and the last question stay. Raises DataError where these alone are too long.
    """
    kept = drop_oldest(tokenizer, turns, length)
    if (size := len(render_prompt(tokenizer, kept))) > length:
        what = "the system prompt and the message" if kept[0].role == "system" else "the message"
        raise DataError(f"{what} would take {size:,} tokens, and there is room for {length:,}: shorten the text")
    return kept


def reply(
    chat_model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    sampling: SamplingParams = GREEDY,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Iterator[TextDelta]:
    """Generate the answer to a prompt of token ids as a stream of pieces; TextStream says what they hold.

    The answer also ends after `max_new_tokens`, or where the context is full; the last piece names the reason.
    """
    text = TextStream(chat_model.tokenizer, stop, ignore_eos=ignore_eos)
    ends = () if ignore_eos else SPECIAL
    for token in generate(chat_model.model, prompt, max_new_tokens, stop_ids=ends, sampling=sampling):
        delta = text.add(token)
        yield delta
        if delta.finish:
            return
    yield text.end()


class Conversation:
    """A conversation with a chat model; the oldest turns are dropped when the context is full."""

    def __init__(self, chat_model: LanguageModel, max_new_tokens: int, system: str = "") -> None:
        """Start a conversation.

        Raises DataError where the system prompt is not valid text, or leaves no room for a question.
        """
        self.chat_model = chat_model
        self.max_new_tokens = min(max_new_tokens, chat_model.context // 2)
        self.turns: list[Turn] = []
        self.begin(system)

    def begin(self, system: str = "") -> None:
        """Start a new conversation. Raises DataError as the constructor does; the old conversation then stays."""
        turns = read_conversation([{"role": "system", "content": system}], "system prompt") if system.strip() else []
        fit_turns(self.chat_model.tokenizer, [*turns, Turn("user", "?")], self._room)
        self.turns = turns

    def ask(self, question: str) -> int:
        """Add a question, and return the number of old turns that were dropped to make room.

        Raises DataError where the question is not valid text or too long; the conversation then stays as it was.
        """
        turns = [*self.turns, *read_conversation([{"role": "user", "content": question}], "message")]
        self.turns = fit_turns(self.chat_model.tokenizer, turns, self._room)
        return len(turns) - len(self.turns)

    def answer(self, sampling: SamplingParams, stop: Sequence[str]) -> Generator[TextDelta, None, None]:
        """Stream the answer, and add it to the conversation, also when the stream is closed early."""
        prompt, text = render_prompt(self.chat_model.tokenizer, self.turns), ""
        try:
            for piece in reply(self.chat_model, prompt, self.max_new_tokens, sampling=sampling, stop=stop):
                text += piece.text
                yield piece
        finally:
            self.turns = [*self.turns, Turn("assistant", text)]

    @property
    def _room(self) -> int:
        return self.chat_model.context - self.max_new_tokens


def talk(conversation: Conversation, sampling: SamplingParams, stop: Sequence[str], title: str = "") -> None:
    """Chat in the terminal until `exit` or the end of input; answers are streamed. `title` is the model's name."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() then edits lines and remembers them)
    if title:
        _show(f"{title}: {conversation.chat_model.context:,} tokens of context; /help lists the commands\n")
    while (question := _read("you  > ")) is not None and question not in LEAVE:
        if not question:
            continue
        try:
            if question.startswith("/"):
                _command(conversation, question)
                continue
            if gone := conversation.ask(question):
                _show(f"(the oldest {gone} turns are forgotten: {conversation.chat_model.context:,} tokens are full)\n")
        except DataError as error:
            _show(f"({printable(str(error))})\n")
            continue
        _show("model> ")
        pieces = conversation.answer(sampling, stop)
        try:
            for piece in pieces:
                _show(printable(piece.text))
                if piece.finish == "length":
                    _show(f" (cut after {conversation.max_new_tokens:,} tokens)")
        except KeyboardInterrupt:
            _show(" (stopped)")
        finally:
            pieces.close()
        _show("\n")


def _command(conversation: Conversation, line: str) -> None:
    name, _, text = line.partition(" ")
    if name == "/reset":
        system = conversation.turns[0] if conversation.turns and conversation.turns[0].role == "system" else None
        conversation.begin(system.content if system else "")
    elif name == "/system":
        conversation.begin(text)
    else:
        unknown = "" if name == "/help" else f"(there is no command {printable(name)})\n"
        _show(f"{unknown}{HELP}\n")
        return
    _show("(a new conversation)\n")


def _read(prompt: str) -> str | None:
    """The next line, or None at the end of input."""
    try:
        return input(prompt).strip()
    except EOFError:
        _show("\n")  # the shell's prompt then stands on a line of its own
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"the input is not UTF-8: {error}") from error


def _show(text: str) -> None:
    print(text, end="", flush=True)  # noqa: T201
