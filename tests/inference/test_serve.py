"""The server as its users meet it: OpenAI's own client and a browser, at a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import uvicorn
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait
from starlette.testclient import TestClient

from tests.conftest import chromium
from tests.inference.conftest import ANSWER, QUESTION, SECRET, Served
from vectorclm.errors import ConfigError
from vectorclm.inference import serve
from vectorclm.inference.chat import open_chat_model
from vectorclm.inference.generate import generate
from vectorclm.inference.http_limits import LimitedHTTP
from vectorclm.runtime.devices import Runtime
from vectorclm.shards.conversations import Turn, render_prompt


def test_a_greedy_answer_is_our_own_whole_or_as_a_stream(served: Served, chat_folder: Path) -> None:
    chat_model = open_chat_model(str(chat_folder), Runtime(threads=1))
    prompt = render_prompt(chat_model.tokenizer, [Turn("user", "Who swims?")])
    ids = list(generate(chat_model.model, prompt, 400, stop_ids=range(5)))
    whole = served.ask(temperature=0)
    assert whole.choices[0].message.content == ANSWER == chat_model.tokenizer.decode(ids[:-1])
    assert whole.choices[0].finish_reason == "stop" and whole.system_fingerprint == f"vc_{chat_model.content[:12]}"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(prompt), len(ids))
    chunks = list(served.ask(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == whole.usage
    text = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(text) == ANSWER and len([one for one in text if one]) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}


def test_options_do_what_they_say(served: Served) -> None:
    cut = served.ask(temperature=0, max_completion_tokens=5)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 5
    assert ANSWER.startswith(cut.choices[0].message.content)
    stopped = served.ask(temperature=0, stop=["at night", "boats"])
    assert stopped.choices[0].message.content == ANSWER.partition("at night")[0]
    assert stopped.choices[0].finish_reason == "stop"
    hot = {"temperature": 2.0, "max_tokens": 40}
    drawn = [served.ask(**hot, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for likeliest in ({"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}):
        assert served.ask(temperature=2.0, **likeliest).choices[0].message.content == ANSWER
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "swims?"}]
    assert served.ask(temperature=0, messages=[{"role": "user", "content": parts}]).choices[0].message.content == ANSWER


def test_the_models_are_listed(served: Served) -> None:
    assert [model.id for model in served.client().models.list()] == ["otter"]
    assert served.client().models.retrieve("otter").owned_by == "vectorclm"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("badger")


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"model": "gpt-4"}, 404, "model", "model_not_found"),
    ({"n": 0}, 400, "n", "invalid_value"),
    ({"n": 129}, 400, "n", "invalid_value"),
    ({"n": 2, "extra_body": {"best_of": 3}}, 400, "best_of", "unsupported_parameter"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "unsupported_parameter"),
    ({"tool_choice": "required"}, 400, "tool_choice", "unsupported_parameter"),
    ({"response_format": {"type": "yaml"}}, 400, "response_format", "invalid_value"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format", "missing_required_parameter"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "banana"}}}},
        400,
        "response_format",
        "invalid_value",
    ),
    ({"extra_body": {"colour": "blue"}}, 400, "colour", "unknown_parameter"),
    ({"temperature": 3}, 400, "temperature", "invalid_value"),
    ({"temperature": "hot"}, 400, "temperature", "invalid_value"),
    ({"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
    ({"stop": [""]}, 400, "stop", "invalid_value"),
    ({"messages": []}, 400, "messages", "invalid_value"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "messages", "invalid_value"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "messages", "invalid_value"),
    ({"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "system", "content": " "}, *QUESTION]}, 400, "messages", "invalid_value"),
    ({"extra_body": {"stream_options": {"colour": 1}}}, 400, "stream_options.colour", "unknown_parameter"),
    ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, 413, None, "request_too_large"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages[0].content",
        "unsupported_value",
    ),
]


@pytest.mark.parametrize(("options", "status", "param", "code"), REFUSED)
def test_what_cannot_be_done_is_refused(
    served: Served, options: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            served.ask(**options, stream=stream)
        error = caught.value
        assert (error.status_code, error.param, error.code) == (status, param, code)
        assert isinstance(error.body, dict) and error.body["type"] == "invalid_request_error"


def test_a_key_that_utf8_cannot_express_is_refused(served: Served) -> None:
    body = b'{"model": "otter", "messages": [], "\\udcff": 1}'
    response = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers=served.headers)
    assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"[" * 100_000, b'{"model": "otter", "messages": [{}]}', b"\xff"])
def test_a_body_that_is_none_is_refused(served: Served, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {SECRET}"}
    for kind in ({}, {"Content-Type": "application/json"}, {"Content-Type": "application/x-www-form-urlencoded"}):
        response = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers={**headers, **kind})
        assert response.status_code == 400 and set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_nothing_is_told_without_the_key_or_under_another_name(served: Served) -> None:
    for key in ("wrong", SECRET[:-1], SECRET + "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            served.client(key).models.list()
        assert caught.value.code == "invalid_api_key"
    headers = {"Authorization": f"Bearer {SECRET}"}
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    assert httpx.get(f"{served.url}/anything").status_code == 401
    assert httpx.get(f"{served.url}/v1/models", headers={**headers, "Host": "evil.example"}).status_code == 403
    assert httpx.get(served.url, headers={"Host": "evil.example:80"}).status_code == 403
    foreign = httpx.get(f"{served.url}/v1/models", headers={**headers, "Origin": "http://evil.example"})
    assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "forbidden"
    assert httpx.get(f"{served.url}/v1/models", headers={**headers, "Origin": served.url}).status_code == 200
    wrong = httpx.get(f"{served.url}/v1/embeddings", headers=headers)
    assert wrong.status_code == 404 and wrong.json()["error"]["code"] == "unknown_url"
    assert httpx.get(f"{served.url}/v1/chat/completions", headers=headers).status_code == 405
    allowed = httpx.options(f"{served.url}/v1/models", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in allowed.headers
    process = psutil.Process(served.process.pid)
    assert SECRET not in " ".join(process.cmdline())


def test_a_key_is_made_only_where_a_person_reads_it() -> None:
    key, made = serve.find_key({}, "127.0.0.1", terminal=True)
    assert made and len(key) >= 32 and key != serve.find_key({}, "::1", terminal=True)[0]
    assert serve.find_key({serve.KEY: SECRET}, "0.0.0.0", terminal=False) == (SECRET, False)
    for host, terminal in (("127.0.0.1", False), ("0.0.0.0", True), ("example.org", True)):
        with pytest.raises(ConfigError, match=f"set {serve.KEY}"):
            serve.find_key({}, host, terminal=terminal)
    with pytest.raises(ConfigError, match="16 or more"):
        serve.find_key({serve.KEY: "short"}, "127.0.0.1", terminal=True)
    with serve.listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="another --host or --port"):
        serve.listen("127.0.0.1", taken.getsockname()[1])


def test_without_a_key_it_starts_where_a_person_reads_its_own_and_not_elsewhere(chat_folder: Path) -> None:
    """The terminal is a real one, and the key that is printed there opens the door."""
    clean = {name: value for name, value in os.environ.items() if name != serve.KEY}
    command = [sys.executable, "-m", "vectorclm", "serve", str(chat_folder), "--port", "0"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"set {serve.KEY} to the key that clients send: nobody reads" in done.stderr
    screen, terminal = os.openpty()
    with os.fdopen(screen) as shown, os.fdopen(terminal, "w") as held:
        options = {"env": clean, "stdin": held, "stdout": held, "stderr": subprocess.PIPE, "text": True}
        done = subprocess.run([*command, "--host", "0.0.0.0"], **options, check=False)  # type: ignore[call-overload]
        assert done.returncode == 2 and "others can reach 0.0.0.0" in done.stderr
        with subprocess.Popen(command, **options) as server:  # type: ignore[call-overload]
            try:
                held.close()  # so that reading ends where the server does
                url = shown.readline().split()[-1]
                key = shown.readline().removeprefix("the key of this run is ").partition(";")[0]
                assert httpx.get(f"{url}/models").status_code == 401
                assert httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
            finally:
                server.terminate()


def test_http_is_read_by_what_limits_headers(chat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[uvicorn.Config] = []
    monkeypatch.setenv(serve.KEY, SECRET)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: configs.append(server.config))
    serve.serve(str(chat_folder), Runtime(threads=1), serve.ServerAddress("127.0.0.1", 0), None)
    assert [config.http for config in configs] == [LimitedHTTP]  # also where httptools, without limits, is installed


def test_a_server_of_all_interfaces_refuses_names_of_strangers(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[uvicorn.Config] = []
    monkeypatch.setenv(serve.KEY, SECRET)
    monkeypatch.delenv("VECTORCLM_ALLOWED_HOSTS", raising=False)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: configs.append(server.config))
    serve.serve(str(chat_folder), Runtime(threads=1), serve.ServerAddress("0.0.0.0", 0), None)
    (config,) = configs
    client = TestClient(config.app)
    for host, status in (("192.0.2.7:8000", 200), ("localhost", 200), ("evil.test", 403)):
        assert client.get("/health", headers={"Host": host}).status_code == status


def test_help_imports_no_server() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "flows.cli", "serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "--cors" in done.stdout and "vectorclm.model_commands" in imported
    assert not imported & {"fastapi", "uvicorn", "prometheus_client", "starlette.applications"}


@pytest.fixture(scope="module")
def browser() -> Iterator[WebDriver]:
    window = chromium(900, 900, loggingPrefs={"browser": "ALL"})
    yield window
    window.quit()


def test_a_person_chats_in_a_browser_by_keyboard_alone(served: Served, browser: WebDriver) -> None:
    def active() -> Any:
        return browser.switch_to.active_element

    def said(kind: str) -> list[str]:
        return [box.text for box in browser.find_elements(By.CSS_SELECTOR, f"#turns > .{kind}")]

    wait = WebDriverWait(browser, 60)
    browser.get(served.url)
    assert active().get_attribute("id") == "key"
    active().send_keys("not the key", Keys.TAB)
    wait.until(lambda _: "the key is missing or wrong" in " ".join(said("notice")))
    active().send_keys(Keys.CONTROL, "a", Keys.NULL, SECRET, Keys.TAB)  # a `clear` would leave the field
    wait.until(lambda _: browser.title == "otter" and active().get_attribute("id") == "message")
    browser.find_element(By.ID, "temperature").clear()
    browser.find_element(By.ID, "temperature").send_keys("0")
    message = browser.find_element(By.ID, "message")
    message.send_keys("Who swims?", Keys.ENTER)
    wait.until(lambda _: said("assistant") == [ANSWER])  # its <b> is text
    wait.until(lambda _: browser.find_element(By.ID, "send").is_enabled())
    message.send_keys("<img src=x onerror=alert(1)>", Keys.SHIFT, Keys.ENTER, Keys.NULL, "Who sings?", Keys.ENTER)
    wait.until(lambda _: len(said("assistant")) == 2)
    assert said("user") == ["Who swims?", "<img src=x onerror=alert(1)>\nWho sings?"]
    assert not browser.find_elements(By.CSS_SELECTOR, "#turns b, #turns img")
    wait.until(lambda _: browser.find_element(By.ID, "send").is_enabled())
    message.send_keys("Who? " * 80, Keys.ENTER)
    wait.until(lambda _: "oldest question and answer are forgotten" in " ".join(said("notice")))
    wait.until(lambda _: len(said("assistant")) == 3)
    wait.until(lambda _: browser.find_element(By.ID, "send").is_enabled())
    client, long = served.client(), {"model": "otter", "messages": QUESTION, "temperature": 2, "stream": True}
    before = [client.chat.completions.create(**long) for _ in range(50)]  # whose answers come first
    message.send_keys("Who swims?", Keys.ENTER)
    wait.until(lambda _: browser.find_element(By.ID, "stop").is_displayed())
    message.send_keys(Keys.ESCAPE)
    wait.until(lambda _: said("notice")[-1] == "Stopped.")
    for stream in before:
        stream.close()
    wait.until(lambda _: not browser.find_element(By.ID, "stop").is_displayed())
    requested = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert all(one.startswith(served.url) for one in requested)
    browser.find_element(By.ID, "reset").send_keys(Keys.ENTER)
    assert said("user") == said("assistant") == []
    message.send_keys("Who? " * 300, Keys.ENTER)
    wait.until(lambda _: "maximum context length is 512 tokens" in " ".join(said("notice")))
    assert message.get_attribute("value").startswith("Who?")  # to be made shorter
    told = [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]
    assert told and all("status of 40" in one for one in told)  # refusals of keys and of what is too long


MARKDOWN = """# A heading

Some **strong** and *slanted* words, `code <b>` and 2 * 3 * 4, snake_case_name.

1. one [link](https://example.org/a?b=1)
2. two [trap](javascript:alert(1))

> a quote

```python
x = "<script>alert(1)</script>"
```
<img src=x onerror=alert(1)>[2J"""


RENDERED = (
    "<h2>A heading</h2>",
    "<p>Some <strong>strong</strong> and <em>slanted</em> words, <code>code &lt;b&gt;</code> and 2 * 3 * 4, ",
    'snake_case_name.</p><ol start="1"><li>one ',
    '<a href="https://example.org/a?b=1" target="_blank" rel="noopener noreferrer">link</a></li>',
    "<li>two [trap](javascript:alert(1))</li></ol><blockquote>a quote</blockquote>",
    '<pre><code>x = "&lt;script&gt;alert(1)&lt;/script&gt;"</code></pre><p>&lt;img src=x onerror=alert(1)&gt;[2J</p>',
)


def test_the_page_renders_markdown_without_html_and_fits_a_telephone(served: Served, browser: WebDriver) -> None:
    browser.get("about:blank")
    browser.get(f"{served.url}/#key={SECRET}")
    wait = WebDriverWait(browser, 60)
    wait.until(lambda _: browser.title == "otter")
    script = "const box = show('assistant', ''); box.replaceChildren(...markdown(harmless(arguments[0]))); "
    html = browser.execute_script(f"{script} return box.innerHTML", MARKDOWN)
    assert html == "".join(RENDERED)
    assert "VECTORCLM_API_KEY" in browser.find_element(By.ID, "about-key").get_attribute("textContent")
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 3, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        browser.execute_script("show('user', 'x'.repeat(500)); markdown('```\\n' + 'y'.repeat(500) + '\\n```')")
        sizes = "return [document.documentElement.scrollWidth, innerWidth, at('send').getBoundingClientRect().height]"
        width, room, height = browser.execute_script(sizes)
        assert width <= room <= 390 and height >= 44
        browser.find_element(By.ID, "message").send_keys("Who sings?", Keys.ENTER)
        wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, ".tools button"))
        browser.execute_cdp_cmd(
            "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        )
        browser.find_element(By.CSS_SELECTOR, ".tools button").click()
        wait.until(lambda _: browser.find_element(By.CSS_SELECTOR, ".tools button").text == "Copied")
        said = browser.find_elements(By.CSS_SELECTOR, "#turns > .assistant")[-1].text
        assert browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])").strip() == said.strip()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_takes_the_key_from_behind_its_address_and_follows_the_scheme(
    served: Served, browser: WebDriver
) -> None:
    def prefer(scheme: str) -> str:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        return str(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    browser.get("about:blank")
    browser.get(f"{served.url}/#key={SECRET}")
    WebDriverWait(browser, 60).until(lambda _: browser.title == "otter")
    assert SECRET not in browser.current_url
    assert prefer("light") == "rgb(255, 255, 255)" != prefer("dark")
