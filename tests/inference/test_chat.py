"""Sampling beside transformers' own, answers as text, and the chat as a person has it in a terminal."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flows.cli import main
from tests.conftest import ANSWERS, write_random_model
from tests.test_model import CONFIG
from vectorclm.errors import DataError
from vectorclm.export.hugging_face import write_model_files
from vectorclm.inference.chat import (
    Conversation,
    LanguageModel,
    check_turns,
    fit_turns,
    open_chat_model,
    reply,
    talk,
)
from vectorclm.inference.config import SamplingParams
from vectorclm.inference.generate import choose, cut_prompt, generate, keep_min_p, keep_top_k, keep_top_p, penalized
from vectorclm.inference.text_stream import find_stop, overlap
from vectorclm.model_commands import ChatOptions, chat
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.conversations import Turn, render_prompt
from vectorclm.store.artifact import StageSpec, Store
from vectorclm.tokenizer import SPECIAL_TOKENS

LOGITS = torch.randn(300, generator=torch.Generator().manual_seed(2)) * 4
SEEN = [17, 9, 17, 200, 44]


@pytest.fixture(scope="module")
def chat_model(chat_folder: Path) -> LanguageModel:
    return open_chat_model(str(chat_folder), Runtime(threads=1))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda logits: penalized(logits, SEEN, 1.7), RepetitionPenaltyLogitsProcessor(1.7)),
        (lambda logits: penalized(logits, SEEN, 0.6), RepetitionPenaltyLogitsProcessor(0.6)),
        (lambda logits: keep_top_k(logits, 7), TopKLogitsWarper(7)),
        (lambda logits: keep_top_k(logits, 1000), TopKLogitsWarper(1000)),
        (lambda logits: keep_top_p(logits, 0.8), TopPLogitsWarper(0.8)),
        (lambda logits: keep_top_p(logits, 1e-9), TopPLogitsWarper(1e-9)),
        (lambda logits: keep_min_p(logits, 0.05), MinPLogitsWarper(0.05)),
    ],
)
def test_each_option_is_that_of_transformers(ours: Callable[[torch.Tensor], torch.Tensor], theirs: object) -> None:
    assert callable(theirs)
    assert torch.equal(ours(LOGITS), theirs(torch.tensor([SEEN]), LOGITS[None].clone())[0])


def test_all_options_together_draw_from_the_probabilities_of_transformers() -> None:
    sampling = SamplingParams(temperature=1.5, top_k=12, top_p=0.9, min_p=0.03, repetition_penalty=1.3)
    chain = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.5),
            TopKLogitsWarper(12),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.03),
        ]
    )
    expected = chain(torch.tensor([SEEN]), LOGITS[None].clone())[0].softmax(dim=0)
    generator, draws = torch.Generator().manual_seed(3), 4000
    drawn = torch.tensor([choose(LOGITS, SEEN, sampling, generator) for _ in range(draws)])
    shares = drawn.bincount(minlength=300) / draws
    assert set(drawn.tolist()) <= set(expected.nonzero()[:, 0].tolist())
    assert 3 < int((expected > 0).sum()) < 12  # so that every option left something out
    error = (expected * (1 - expected) / draws).sqrt()
    assert ((shares - expected).abs() <= 4 * error).all()


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-30, 1e-6])
def test_the_coldest_draws_take_the_likeliest(temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, min_p=1.0, top_p=1e-12, repetition_penalty=0.01)
    assert choose(LOGITS, [17], sampling, torch.Generator()) == int(penalized(LOGITS, [17], 0.01).argmax())


def test_special_tokens_are_spared_the_penalty() -> None:
    assert torch.equal(penalized(LOGITS, [0, 1, 2, 3, 4], 2.0), LOGITS)
    assert (
        choose(LOGITS, [int(LOGITS.argmax())], SamplingParams(repetition_penalty=50.0), torch.Generator())
        != LOGITS.argmax()
    )


def test_a_stop_string_is_found_and_its_beginning_held() -> None:
    assert find_stop("ab--cd", ["cd", "--"]) == 2 and find_stop("ab", ["c"]) is None
    assert [overlap(text, ["</end>", "<<<"]) for text in ("a", "a<", "a</e", "a<<", "a</end", "</ <")] == [
        0,
        1,
        3,
        2,
        5,
        1,
    ]


def prompt_of(chat_model: LanguageModel, question: str) -> list[int]:
    return render_prompt(chat_model.tokenizer, [Turn("user", question)])


@pytest.mark.parametrize("question", list(ANSWERS))
def test_an_answer_comes_in_whole_characters_and_ends_its_turn(chat_model: LanguageModel, question: str) -> None:
    prompt = prompt_of(chat_model, question)
    pieces = list(reply(chat_model, prompt, 200))
    assert "".join(piece.text for piece in pieces) == ANSWERS[question]
    assert not any("\ufffd" in piece.text for piece in pieces) and len(pieces) > 5
    assert pieces[-1].finish == "stop" and all(piece.finish is None for piece in pieces[:-1])
    made = list(generate(chat_model.model, prompt, 200, stop_ids=range(len(SPECIAL_TOKENS))))
    assert sum(piece.tokens for piece in pieces) == len(made)


def test_the_pieces_of_any_answer_are_the_text_of_its_tokens(chat_model: LanguageModel) -> None:
    """Hot, so that most of the bytes are no whole characters."""
    sampling = SamplingParams(temperature=60.0, seed=5)
    prompt = prompt_of(chat_model, "Who swims?")
    ids = list(generate(chat_model.model, prompt, 120, stop_ids=range(5), sampling=sampling))
    pieces = list(reply(chat_model, prompt, 120, sampling=sampling))
    text = chat_model.tokenizer.decode([i for i in ids if i >= 5], skip_special_tokens=False)
    assert "\ufffd" in text and "".join(piece.text for piece in pieces) == text
    assert sum(piece.tokens for piece in pieces) == len(ids)


def test_an_answer_stops_before_a_string_or_at_its_length(chat_model: LanguageModel) -> None:
    prompt, answer = prompt_of(chat_model, "Who swims?"), ANSWERS["Who swims?"]
    pieces = list(reply(chat_model, prompt, 200, stop=["never", " at night"]))
    assert "".join(piece.text for piece in pieces) == answer.partition(" at night")[0]
    assert pieces[-1].finish == "stop"
    pieces = list(reply(chat_model, prompt, 200, stop=[answer + "!"]))  # held to the last, and then told
    assert "".join(piece.text for piece in pieces) == answer
    pieces = list(reply(chat_model, prompt, 4))
    assert pieces[-1].finish == "length" and sum(piece.tokens for piece in pieces) == 4


def test_turns_are_forgotten_in_pairs_but_never_the_system_prompt(chat_model: LanguageModel) -> None:
    turns = [Turn("system", "Be brief.")]
    for number in range(9):
        turns += [Turn("user", f"Question {number}?"), Turn("assistant", "Yes.")]
    turns.append(Turn("user", "And?"))
    kept = fit_turns(chat_model.tokenizer, turns, 150)
    assert kept[0] == turns[0] and kept[1:] == turns[-len(kept) + 1 :] and kept[1].role == "user"
    assert len(render_prompt(chat_model.tokenizer, kept)) <= 150
    assert len(render_prompt(chat_model.tokenizer, [turns[0], *turns[-len(kept) - 1 :]])) > 150
    with pytest.raises(DataError, match=r"the system prompt and the message would take .* room for 20"):
        fit_turns(chat_model.tokenizer, turns, 20)


def test_evaluations_shorten_a_conversation_as_the_chat_does(chat_model: LanguageModel) -> None:
    """The system turn stays as long as there is room for it, and a question without room loses its beginning."""
    tokenizer = chat_model.tokenizer
    turns = [Turn("system", "Be brief.")]
    for number in range(9):
        turns += [Turn("user", f"Question {number}?"), Turn("assistant", "Yes.")]
    turns.append(Turn("user", "And?"))
    kept = fit_turns(tokenizer, turns, 150)
    assert 2 < len(kept) < len(turns) and kept[0] == turns[0]
    assert cut_prompt(tokenizer, turns, 150) == render_prompt(tokenizer, kept)
    wordy = [Turn("system", "Be brief. " * 100), *turns[-3:]]
    assert cut_prompt(tokenizer, wordy, 150) == render_prompt(tokenizer, turns[-1:])
    whole = render_prompt(tokenizer, [Turn("user", "And? " * 100)])
    assert cut_prompt(tokenizer, [Turn("user", "And? " * 100)], 150) == [whole[0], *whole[-149:]]


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("ua", "the last message must be the user's"),
        ("s", "the last message must be the user's"),
        ("uu", "message 1 is the user's where the assistant's is due"),
        ("sau", "message 1 is the assistant's where the user's is due"),
        ("usu", "message 1 is the system's where the assistant's is due"),
    ],
)
def test_roles_out_of_order_are_refused(roles: str, message: str) -> None:
    names = {"u": "user", "a": "assistant", "s": "system"}
    with pytest.raises(DataError, match=message):
        check_turns([Turn(names[role], "x") for role in roles])  # type: ignore[arg-type]
    check_turns([Turn("system", "x"), Turn("user", "x"), Turn("assistant", ""), Turn("user", "x")])


def test_a_stopped_answer_is_remembered_as_far_as_it_came(chat_model: LanguageModel) -> None:
    conversation = Conversation(chat_model, 100, "Be kind.")
    assert conversation.ask("Who swims?") == 0
    pieces = conversation.answer(SamplingParams(), [])
    text = next(pieces).text + next(pieces).text
    pieces.close()
    assert conversation.turns[1:] == [Turn("user", "Who swims?"), Turn("assistant", text)]
    with pytest.raises(DataError, match="the system prompt and the message would take"):
        conversation.ask("Who? " * 500)
    assert len(conversation.turns) == 3


def test_ctrl_c_ends_an_answer_and_not_the_chat(
    chat_model: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, steps, typed = chat_model.model.next_logits, 0, iter(["Who swims?", "", "Who sings?", "exit"])

    def interrupted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(chat_model.model, "next_logits", interrupted)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    conversation = Conversation(chat_model, 100)
    talk(conversation, SamplingParams(), [])
    said = [turn.content for turn in conversation.turns]
    assert said[1] and ANSWERS["Who swims?"].startswith(said[1]) and len(said) == 4
    assert capsys.readouterr().out.startswith(f"model> {said[1]} (stopped)\nmodel> ")


@pytest.mark.parametrize("system", ["", "Be kind."])
def test_reset_forgets_what_was_said_and_keeps_the_system_prompt(
    chat_model: LanguageModel, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    typed = iter(["Who swims?", "/reset", "Who sings?", "quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    conversation = Conversation(chat_model, 60, system)
    talk(conversation, SamplingParams(), [])
    begun = [Turn("system", system)] if system else []
    assert conversation.turns[:-1] == [*begun, Turn("user", "Who sings?")]


def test_a_chat_in_the_terminal(chat_folder: Path) -> None:
    """The third question fills the context of 512 tokens, so the first is forgotten."""
    typed = (
        f"Who swims?\n\n/huh\x1b[2J\n/reset\nWho sings?\nWho {'? ' * 170}\nWho {'! ' * 170}\n{'Who? ' * 600}\n/exit\n"
    )
    options = ["--temperature", "0", "--max-new-tokens", "60", "--stop", " at night"]
    command = [sys.executable, "-m", "vectorclm", "chat", str(chat_folder), *options]
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and done.stderr == ""
    opening, *lines = done.stdout.split("you  > ")
    assert opening == f"{chat_folder}: 512 tokens of context; /help lists the commands\n"
    assert lines.pop(1) == ""  # the empty line is nothing
    lines.insert(0, "")
    assert lines[1] == "model> The otter swims by the lake\n"
    assert lines[2].startswith("(there is no command /huh[2J)\n") and "/system TEXT" in lines[2]
    assert lines[3] == "(a new conversation)\n" and lines[4] == f"model> {ANSWERS['Who sings?']}\n"
    assert "(the oldest" in lines[6] and "turns are forgotten: 512 tokens are full)" in lines[6]
    assert "(the message would take" in lines[7] and "room for 452" in lines[7]


def test_a_chat_says_the_name_that_was_typed_and_the_model_that_it_means(
    chat_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "store"))
    model = StageSpec("finetune", 1, {}, {})
    export = StageSpec("export", 1, {"name": "tales"}, {"finetune": model.fingerprint})
    store.publish(model, Path(shutil.copytree(chat_folder, tmp_path / "model")), {})
    (tmp_path / "empty").mkdir()
    store.publish(export, tmp_path / "empty", {"chat": "chat"})
    monkeypatch.setattr("builtins.input", lambda _: "exit")
    place = f"finetune/{model.fingerprint[:12]}"
    for name, shown in (("tales", f"tales ({place})"), (place, place), (f"{store.uri}/{place}", place)):
        assert main(["chat", name, "--store", store.uri]) == 0
        assert capsys.readouterr().out.startswith(f"{shown}: 512 tokens of context; ")


def test_a_chat_that_cannot_be_is_refused_before_it_begins(chat_folder: Path, tmp_path: Path) -> None:
    for prompt, message in {
        "\udcff": "a lone surrogate",
        "Be. " * 400: "the system prompt and the message",
    }.items():
        with pytest.raises(DataError, match=message):
            chat(str(chat_folder), options=ChatOptions(system=prompt))
    (tmp_path / "model.safetensors").write_bytes((chat_folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((chat_folder / "config.json").read_bytes())
    write_model_files(chat_folder, 512, chat=False, out=tmp_path)
    with pytest.raises(DataError, match="is a base model"):
        open_chat_model(str(tmp_path), Runtime(threads=1))
    with pytest.raises(DataError, match="there is no folder"):
        open_chat_model(str(tmp_path / "none"), Runtime(threads=1))


def test_a_signal_ends_a_long_answer_in_the_terminal_and_the_system_prompt_began_it(
    tiny_text: list[str], tmp_path: Path
) -> None:
    """A model that knows no end, as Ctrl-C meets it; the next line is read as if nothing had been."""
    config = CONFIG.model_copy(update={"max_position_embeddings": 8192})
    folder = write_random_model(tmp_path, tiny_text, config, 20_000, chat=True)
    command = [sys.executable, "-m", "vectorclm", "chat", str(folder), "--system", "Be brief.", "--temperature", "0"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*command, "--max-new-tokens", "4096"], **pipes, bufsize=0) as chat:
        assert chat.stdin is not None and chat.stdout is not None and chat.stderr is not None
        chat.stdin.write(b"Who swims?\n")
        told = b""
        while not told.partition(b"model> ")[2]:
            told += chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        chat.stdin.write(b"/exit\n")
        chat.stdin.close()
        told += chat.stdout.read()
        assert chat.wait(60) == 0 and chat.stderr.read() == b""
    said, stopped, rest = told.decode().partition("model> ")[2].partition(" (stopped)\n")
    assert stopped and rest == "you  > "
    model = open_chat_model(str(folder), Runtime(threads=1))
    for system, same in (([Turn("system", "Be brief.")], True), ([], False)):
        prompt = render_prompt(model.tokenizer, [*system, Turn("user", "Who swims?")])
        pieces = "".join(piece.text for piece in reply(model, prompt, 64))
        shown = "".join(character for character in pieces if character.isprintable() or character in "\n\t")
        assert (said[:20] == shown[: len(said[:20])]) is same
