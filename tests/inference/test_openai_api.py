"""OpenAI's API as clients use it: text completions, several choices, ignored fields, CORS, metrics and the log."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.inference.conftest import ANSWER, PAGE, QUESTION, SECRET, Served, check_log, serve_while
from vectorclm.errors import ConfigError, DataError
from vectorclm.export.hugging_face import write_model_files
from vectorclm.inference import serve
from vectorclm.inference.chat import LanguageModel, open_chat_model, open_language_model
from vectorclm.inference.engine import Engine
from vectorclm.inference.generate import generate
from vectorclm.inference.guard import allowed_origins
from vectorclm.inference.http_limits import LimitedHTTP
from vectorclm.inference.openai_app import make_app
from vectorclm.inference.openai_errors import Refusal
from vectorclm.inference.openai_requests import ChatRequest, join_system
from vectorclm.model_commands import ServeOptions
from vectorclm.model_commands import serve as serve_command
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.conversations import Turn, render_prompt
from vectorclm.tokenizer import BOS_ID, SPECIAL_TOKENS, encode


@pytest.fixture(scope="module")
def model(chat_folder: Path) -> LanguageModel:
    return open_language_model(str(chat_folder), Runtime(threads=1))


@pytest.fixture(scope="module")
def base_folder(chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a base model."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((chat_folder / name).read_bytes())
    write_model_files(chat_folder, 512, chat=False, out=folder)
    return folder


def continued(model: LanguageModel, text: str, tokens: int) -> str:
    ids = generate(model.model, [BOS_ID, *encode(model.tokenizer, text)], tokens, stop_ids=range(5))
    return str(model.tokenizer.decode([i for i in ids if i >= len(SPECIAL_TOKENS)], skip_special_tokens=False))


def test_a_text_is_continued_whole_and_as_a_stream(served: Served, model: LanguageModel) -> None:
    expected = continued(model, "The otter swims", 16)
    whole = served.complete(prompt="The otter swims", temperature=0)
    assert whole.choices[0].text == expected and whole.object == "text_completion"
    assert whole.usage.prompt_tokens == 1 + len(encode(model.tokenizer, "The otter swims"))
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(served.complete(prompt="The otter swims", temperature=0, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and {chunk.usage for chunk in chunks[:-1]} == {None}
    echo = served.complete(prompt="The otter swims", temperature=0, echo=True)
    assert echo.choices[0].text == "The otter swims" + expected


def test_a_request_can_have_several_prompts_as_texts_or_as_tokens(served: Served, model: LanguageModel) -> None:
    texts = ["The otter", "Wer singt"]
    expected = [continued(model, text, 8) for text in texts for _ in range(2)]
    ids = [[BOS_ID, *encode(model.tokenizer, text)] for text in texts]
    for prompt in (texts, ids):
        made = served.complete(prompt=prompt, temperature=0, max_tokens=8, n=2)
        assert [choice.text for choice in made.choices] == expected
        assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert served.complete(prompt=ids[0], temperature=0, max_tokens=8).choices[0].text == expected[0]


@pytest.mark.parametrize(
    ("options", "param", "code"),
    [
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": [[]]}, "prompt", "invalid_value"),
        ({"prompt": [320]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": ["x"] * 65, "n": 2}, "n", "invalid_value"),
        ({"prompt": "x" * 2000}, "prompt", "context_length_exceeded"),
        ({"prompt": [5] * 512}, "prompt", "context_length_exceeded"),
        ({"prompt": "x", "logprobs": 21}, "logprobs", "invalid_value"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"prompt": "x", "suffix": "y"}, "suffix", "unsupported_parameter"),
        ({"prompt": "x", "best_of": 2}, "best_of", "unsupported_parameter"),
        ({"prompt": "x", "extra_body": {"messages": QUESTION}}, "messages", "unknown_parameter"),
    ],
)
def test_a_text_that_cannot_be_continued_is_refused(
    served: Served, options: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.complete(**options)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_several_choices_are_generated_and_a_seed_repeats_them(served: Served) -> None:
    options = {"n": 3, "temperature": 2.0, "max_tokens": 12}
    first, second, other = (served.ask(**options, seed=seed) for seed in (4, 4, 400))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices] and len(set(texts)) == 3
    assert texts != [choice.message.content for choice in other.choices]
    assert texts[0] == served.ask(temperature=2.0, max_tokens=12, seed=4).choices[0].message.content
    assert first.usage.completion_tokens <= 36 and first.usage.prompt_tokens < 60
    streamed = ["", "", ""]
    for chunk in served.ask(**options, seed=4, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_clients_that_ask_at_once_get_their_own_answers(served: Served) -> None:
    """More of them than the server generates at once; each has a seed of its own, and half of them stream."""

    def ask(number: int) -> str:
        options = {"temperature": 2.0, "seed": number % 5, "max_tokens": 10 + number % 3}
        if number % 2:
            return str(served.ask(**options).choices[0].message.content)
        return "".join(chunk.choices[0].delta.content or "" for chunk in served.ask(**options, stream=True))

    with ThreadPoolExecutor(40) as clients:
        together = list(clients.map(ask, range(40)))
    assert together == [ask(number) for number in range(40)] and len(set(together)) > 5
    with pytest.raises(ConfigError, match="--parallel must be 1 or more"):
        serve_command(str(Path.cwd()), options=ServeOptions(parallel=0))


def test_an_answer_is_cut_to_what_is_left_of_the_context(served: Served) -> None:
    """Past its turn's end, the answer would go on for ever."""
    endless = {"ignore_eos": True}
    for limit in ({"max_tokens": 100_000}, {"max_completion_tokens": 100_000}, {}):
        made = served.ask(temperature=0, **limit, extra_body=endless)
        assert made.usage.total_tokens == 512 and made.choices[0].finish_reason == "length"
        assert made.choices[0].message.content.startswith(ANSWER)
    made = served.complete(prompt="x", temperature=0, max_tokens=9999, extra_body=endless)
    assert made.usage.total_tokens == 512


HARMLESS: list[dict[str, Any]] = [
    {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"},
    {"parallel_tool_calls": True, "tool_choice": "auto", "reasoning_effort": "low"},
    {"logprobs": False, "top_logprobs": 0, "presence_penalty": 0.0, "logit_bias": {}},
    {"extra_body": {"top_k": -1, "min_tokens": 0, "skip_special_tokens": True, "verbosity": "low", "seed": None}},
    {"stream": True, "stream_options": {"include_usage": None, "include_obfuscation": False}},
    {"messages": [{**QUESTION[0], "name": "Ann"}], "max_tokens": 100_000},
]


@pytest.mark.parametrize("options", HARMLESS)
def test_fields_that_change_nothing_are_ignored(served: Served, options: dict[str, Any]) -> None:
    made = served.ask(temperature=0, **options)
    if options.get("stream"):
        assert "".join(chunk.choices[0].delta.content or "" for chunk in made) == ANSWER
    else:
        assert made.choices[0].message.content == ANSWER


def test_usage_comes_with_each_event_where_it_is_asked_for(served: Served) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(served.ask(temperature=0, stream=True, stream_options=options))
    used = [chunk.usage.completion_tokens for chunk in chunks]
    assert used[0] == 0 and used[-1] > 5 and all(before <= after for before, after in pairwise(used))
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {chunks[0].usage.prompt_tokens}


def test_system_messages_are_joined_wherever_they_stand(model: LanguageModel) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": "Be brief."},
        *QUESTION,
        {"role": "assistant", "content": "Who?"},
        {"role": "system", "content": "Be exact."},
        *QUESTION,
    ]
    turns = [Turn("user", "Who swims?"), Turn("assistant", "Who?"), Turn("user", "Who swims?")]
    joined = [Turn("system", "Be kind.\n\nBe brief.\n\nBe exact."), *turns]
    made = ChatRequest.model_validate({"model": "otter", "messages": messages}).read(model)
    assert list(made.choices[0].prompt) == render_prompt(model.tokenizer, joined)
    assert join_system(turns) == turns


def test_a_long_text_is_refused_without_encoding_it(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of no more tokens than the context is never refused as too long, however many characters it has."""
    from vectorclm.inference import openai_requests

    encoded = 0

    def counted(tokenizer: Any, text: str) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        return encode(tokenizer, text)

    monkeypatch.setattr(openai_requests, "encode", counted)
    asked = {"model": "otter", "messages": [{"role": "user", "content": "x" * 900_000}]}
    with pytest.raises(Refusal, match="more than 512 are in the messages"):
        ChatRequest.model_validate(asked).read(model)
    assert 0 < encoded <= 4 * openai_requests.PIECE
    monkeypatch.setattr(openai_requests, "PIECE", 3)  # so that each word is cut
    room = 512 - 1 - len(render_prompt(model.tokenizer, [Turn("user", "")]))
    text = " the"
    while len(encode(model.tokenizer, f"user\n{text} the")) - len(encode(model.tokenizer, "user\n")) <= room:
        text += " the"
    ChatRequest.model_validate({"model": "otter", "messages": [{"role": "user", "content": text}]}).read(model)


def in_process(folder: Path, client: Callable[[str], None], origins: tuple[str, ...] = ()) -> None:
    """A server with a model, by this process's uvicorn, while a client uses its address."""
    engine = Engine(open_language_model(str(folder), Runtime(threads=1)))
    app = make_app(engine, "otter", SECRET, ["127.0.0.1"], origins)
    serve_while(app, lambda address: client(f"http://127.0.0.1:{address[1]}"), http=LimitedHTTP)


def test_a_base_model_continues_texts_and_refuses_to_chat(base_folder: Path, model: LanguageModel) -> None:
    def client(url: str) -> None:
        api = OpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0, timeout=60)
        made = api.completions.create(model="otter", prompt="The otter", temperature=0)
        assert made.choices[0].text == continued(model, "The otter", 16)
        with pytest.raises(openai.BadRequestError, match="use /v1/completions") as caught:
            api.chat.completions.create(model="otter", messages=QUESTION)  # type: ignore[arg-type]
        assert caught.value.code == "unsupported_model"

    in_process(base_folder, client)
    with pytest.raises(DataError, match="is a base model"):
        open_chat_model(str(base_folder), Runtime(threads=1))


def test_pages_of_an_allowed_origin_use_the_api_and_others_do_not(served: Served) -> None:
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    path, key = f"{served.url}/v1/models", served.headers
    allowed = httpx.options(path, headers={"Origin": PAGE, **ask})
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == PAGE
    headers = set(re.split(", ?", allowed.headers["access-control-allow-headers"].lower()))
    assert {"authorization", "x-stainless-os"} <= headers
    read = httpx.get(path, headers={"Origin": PAGE, "Sec-Fetch-Site": "cross-site", **key})
    assert read.status_code == 200 and read.headers["access-control-allow-origin"] == PAGE
    unkeyed = httpx.get(path, headers={"Origin": PAGE})  # the page can read the reason
    assert unkeyed.status_code == 401 and unkeyed.headers["access-control-allow-origin"] == PAGE
    for origin in ("https://evil.example", "null", f"{PAGE}.evil.example", "http://chat.example.com"):
        assert httpx.options(path, headers={"Origin": origin, **ask}).status_code == 403
        assert httpx.get(path, headers={"Origin": origin, **key}).status_code == 403
    assert httpx.get(path, headers={"Origin": PAGE, "Host": "evil.example", **key}).status_code == 403


def test_any_page_may_use_the_api_where_that_is_asked_for_but_not_under_another_name(chat_folder: Path) -> None:
    def client(url: str) -> None:
        headers = {"Origin": "null", "Authorization": f"Bearer {SECRET}"}
        read = httpx.get(f"{url}/v1/models", headers=headers)
        assert read.status_code == 200 and read.headers["access-control-allow-origin"] == "*"
        assert httpx.get(f"{url}/v1/models", headers={"Origin": "null"}).status_code == 401
        assert httpx.get(f"{url}/v1/models", headers={**headers, "Host": "evil.example"}).status_code == 403

    in_process(chat_folder, client, ("*",))


def test_origins_are_written_as_browsers_send_them() -> None:
    given = ["HTTPS://Chat.Example.com:443/", "http://localhost:3000", "http://[0::1]:80", "*"]
    assert allowed_origins(given) == [PAGE, "http://localhost:3000", "http://[::1]", "*"]
    for text in ("chat.example.com", "https://chat.example.com/page", "ftp://x", "", "null"):
        with pytest.raises(ConfigError, match=r"--cors .* is not an origin"):
            allowed_origins([text])


def test_health_needs_no_key_and_metrics_count_what_was_generated(served: Served) -> None:
    def metrics() -> dict[str, float]:
        text = httpx.get(f"{served.url}/metrics", headers=served.headers).text
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        }

    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}
    assert httpx.head(f"{served.url}/health").status_code == 200
    assert httpx.get(f"{served.url}/health", headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    before = metrics()
    made = served.ask(temperature=0)
    after = metrics()
    name = 'vectorclm_requests_total{method="POST",route="/v1/chat/completions",status="200"}'
    assert after[name] == before.get(name, 0) + 1
    for field, used in (("generated", made.usage.completion_tokens), ("prompt", made.usage.prompt_tokens)):
        name = f"vectorclm_{field}_tokens_total"
        assert after[name] == before[name] + used
    assert after["vectorclm_time_to_first_token_seconds_count"] >= 1
    assert after["vectorclm_requests_waiting"] == after["vectorclm_answers_running"] == 0
    assert SECRET not in str(after)


def test_each_request_is_a_line_of_the_log_and_the_key_is_in_none(served: Served) -> None:
    """Clients put the key where it does not belong: into a path, a query, a header, a method, a body."""
    start, keyed = len(served.output.read_text()), f"{served.url}/v1/models"
    made = served.ask(temperature=0)
    for request in (
        httpx.Request("GET", f"{keyed}/{SECRET}", headers=served.headers),
        httpx.Request("GET", f"{keyed}?api_key={SECRET}", headers=served.headers),
        httpx.Request("GET", f"{served.url}/{SECRET}", headers={"Referer": f"{served.url}/#key={SECRET}"}),
        httpx.Request(SECRET, keyed, headers={"Authorization": SECRET, "X-Api-Key": SECRET}),
        httpx.Request("POST", f"{served.url}/v1/chat/completions", headers=served.headers, content=SECRET),
    ):
        with httpx.Client() as client:
            client.send(request)
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=60) as connection:
        connection.sendall(f"GET /{SECRET}\r\n{SECRET}: x\r\n\r\n".encode())
        connection.makefile("rb").read()
    log = served.output.read_text()[start:]
    check_log(log)
    usage = f"{made.usage.prompt_tokens} prompt and {made.usage.completion_tokens} new tokens"
    assert re.search(rf"127\.0\.0\.1 POST /v1/chat/completions 200, {usage}, \d", log)
    assert "GET /v1/models/{name:path} 404" in log and "GET other 401" in log and "other other 401" in log


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_server_during_an_answer(chat_folder: Path, number: int, code: int) -> None:
    """The answer would take minutes."""
    command = [sys.executable, "-m", "flows.cli", "serve", str(chat_folder), "--port", "0"]
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, serve.KEY: SECRET}, **options) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[2].rstrip("/")
            api = OpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0, timeout=60)
            long: dict[str, Any] = {"messages": QUESTION, "n": 128, "extra_body": {"ignore_eos": True}}
            with api.chat.completions.create(model="otter", stream=True, **long) as stream:
                next(chunk for chunk in stream if chunk.choices[0].delta.content)
                process.send_signal(number)
                with pytest.raises(openai.APIError, match="the server shuts down"):
                    list(stream)
                _, errors = process.communicate(timeout=60)
            assert process.returncode == code
            check_log(errors)
        finally:
            process.kill()
