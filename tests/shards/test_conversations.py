"""Conversations in every schema, and the rows that are none: counted, or named by their place."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.conftest import one_of, write_tokenizer
from tests.shards.test_writer import contents
from vectorclm.corpus.decontamination import Benchmarks
from vectorclm.corpus.source_reader import find_row, open_source
from vectorclm.errors import DataError
from vectorclm.runtime.workers import open_workers
from vectorclm.shards.chat_writer import MalformedRowError, write_chat_shards
from vectorclm.shards.config import ChatConfig, ChatSource
from vectorclm.shards.conversations import Turn, find_fault, read_conversation
from vectorclm.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), tiny_text, 307, 20_000, 64))


def config(**changes: Any) -> ChatConfig:
    source = ChatSource(label="chat", path="json", conversations=100)
    return ChatConfig(sources=[source], sequence_length=128, validation_share=0.2, **changes)


def talk(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles)]


GOOD = [talk("user", "assistant"), talk("system", "user", "assistant")]
MALFORMED = [
    (talk("assistant", "user"), "role_order", "turn 0, the assistant's, stands first: 'assistant 0'"),
    (talk("user", "user", "assistant"), "role_order", "turn 1, the user's, stands after the user's: 'user 1'"),
    (talk("user", "assistant", "assistant"), "role_order", "turn 2, the assistant's, stands after the assistant's"),
    (talk("user", "system", "assistant"), "role_order", "turn 1, the system's, stands after the user's"),
    (talk("system", "system", "user"), "role_order", "turn 1, the system's, stands after the system's"),
    (talk("system", "assistant"), "role_order", "turn 1, the assistant's, stands after the system's"),
    ([*talk("user"), {"role": "assistant", "content": " \n"}], "empty_turn", "turn 1, the assistant's, is empty"),
]


@pytest.mark.parametrize(("row", "reason", "what"), MALFORMED)
def test_roles_out_of_order_and_empty_turns_are_refused_with_their_place(
    row: list[dict[str, str]], reason: str, what: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="chat, row 2 as drawn, column messages: ") as error:
        write_chat_shards(config(), {"chat": [*GOOD, row]}, tokenizer, 1, tmp_path)
    assert what in str(error.value) and "set chat.malformed to drop" in str(error.value)
    assert find_fault(read_conversation(row, ""))[0] == reason  # type: ignore[index]
    assert not list(tmp_path.iterdir())


def test_malformed_conversations_are_left_out_and_counted_where_that_is_asked_for(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [[*talk("user"), {"role": "assistant", "content": str(i)}] for i in range(50)]
    asked, every = config(malformed="drop"), {"chat": [*(row for row, *_ in MALFORMED), *rows]}
    counts = write_chat_shards(asked, every, tokenizer, 1, tmp_path)["sources"]["chat"]
    assert counts["dropped"] == {"role_order": 6, "empty_turn": 1} and counts["read"] == 57


def turns(question: Any, answer: Any = "Yes.", **roles: str) -> list[dict[str, Any]]:
    user, assistant = roles.get("user", "user"), roles.get("assistant", "assistant")
    return [{"role": user, "content": question}, {"role": assistant, "content": answer}]


BROKEN = [
    (None, "not_a_conversation"),
    ("hello", "not_a_conversation"),
    ([None], "not_a_conversation"),
    ([{"text": "hello"}], "not_a_conversation"),
    (turns("Is it?", None), "not_text"),
    (turns([{"type": "image_url", "image_url": {"url": "x"}}]), "not_text"),
    (turns(["Is", "it?"]), "not_text"),
    (turns("Is it \ud800?"), "invalid_utf8"),
    (turns("Is it \0?"), "nul"),
    (turns("Is it?", assistant="tool"), "unknown_role"),
    (turns("Is it?", assistant="functions"), "unknown_role"),
    ([{"role": ["user"], "content": "Is it?"}], "unknown_role"),
    ([{"role": None, "content": None}], "unknown_role"),
]


@pytest.mark.parametrize(("row", "reason"), BROKEN)
def test_every_kind_of_malformed_row_is_counted_or_refused(
    row: Any, reason: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    rows = [turns(f"Is it {i}?") for i in range(50)]
    counts = write_chat_shards(config(malformed="drop"), {"chat": [row, *rows]}, tokenizer, 1, tmp_path)
    assert counts["sources"]["chat"]["dropped"] == {reason: 1}
    with pytest.raises(DataError, match=r"chat, row 50 as drawn, column messages: .*set chat\.malformed to drop"):
        write_chat_shards(config(), {"chat": [*rows, row]}, tokenizer, 1, tmp_path / "refused")


def test_what_can_be_read_is_not_lost(tokenizer: Tokenizer, tmp_path: Path) -> None:
    spoken = turns("Is it?")
    wanted = read_conversation(spoken, "")
    both = [
        {"role": None, "content": None, "from": "human", "value": "Is it?"},
        {**spoken[1], "from": None, "value": None},
    ]
    lists = {"role": ["user", "assistant"], "content": ["Is it?", "Yes."]}
    parts = turns([{"type": "text", "text": "Is "}, {"type": "text", "text": "it?"}], [{"text": "Yes."}])
    for row in (both, lists, parts, turns("Is it?", user="User", assistant="ASSISTANT"), turns("Is it?", user="Human")):
        assert read_conversation(row, "") == wanted
    developer = [{"role": "developer", "content": "Be kind."}, *spoken]
    assert read_conversation(developer, "")[0] == Turn("system", "Be kind.")
    rows = [
        [{"role": "system", "content": empty}, *turns(f"Is it {i}?")] for i, empty in enumerate(["", None, " "] * 15)
    ]
    summary = write_chat_shards(config(malformed="drop"), {"chat": rows}, tokenizer, 1, tmp_path)["sources"]["chat"]
    assert summary["dropped"] == {} and summary["train"] + summary["validation"] == 45


def test_a_malformed_row_is_named_by_its_place_in_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"messages": turns(f"Is it {i}?")} for i in range(40)]
    rows[30] = {"messages": turns("Is it 30?", None)}
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ChatSource(label="chat", path="json", data_files=str(path), conversations=100)
    shuffled = open_source(source, None, None, ["messages"]).shuffle(seed=1, buffer_size=100)
    drawn = {"chat": (row["messages"] for row in shuffled)}
    with pytest.raises(MalformedRowError) as error:
        write_chat_shards(config(), drawn, tokenizer, 1, tmp_path / "out")
    assert find_row(source, None, "messages", error.value.row) == f"{path}, row 31"


@pytest.mark.parametrize("workers", one_of([2, 4]))
def test_the_number_of_workers_changes_no_byte_of_chat_shards(
    workers: int, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """With repetitions, malformed rows, a benchmark, and special tokens that a message spells out."""
    rows: list[Any] = [talk("user", *("assistant", "user") * (1 + n % 40), "assistant") for n in range(700)]
    for number, row in enumerate(rows):
        row[0]["content"] = f"say {number % 600} <|im_end|>"
    rows[300:300] = [row for row, *_ in MALFORMED]
    rows[500][-1]["content"] = question = "the otters of the long river moved to the quiet lake behind the mill"
    source = ChatSource(label="chat", path="json", conversations=650)
    asked, refusing = (config(malformed=how).model_copy(update={"sources": [source]}) for how in ("drop", "refuse"))
    marks, found = Benchmarks({"quiz": [question]}), []
    for count in (1, workers):
        out = tmp_path / str(count)
        with open_workers(count):
            summary = write_chat_shards(asked, {"chat": iter(rows)}, tokenizer, 1, out, marks)
            with pytest.raises(MalformedRowError, match="row 300 as drawn"):
                write_chat_shards(refusing, {"chat": rows}, tokenizer, 1, out)
        found.append((summary, contents(out)))
    assert found[0] == found[1]
    dropped = found[0][0]["sources"]["chat"]["dropped"]
    assert dropped["role_order"] == 6 and dropped["contaminated"] == 1 and dropped["duplicate"] > 20
