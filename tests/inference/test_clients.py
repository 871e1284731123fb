"""Programs that speak OpenAI's API, each as its own page says, at a running server.

Those that need packages of their own run with VECTORCLM_CLIENTS=all.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import CLIENTS
from tests.inference.conftest import ANSWER, SECRET, Served
from tests.services.clients import node_with, python_with, run_client

SCRIPTS = Path(__file__).parent / "clients"
PYTHON = ["litellm", "langchain-openai", "llama-index-llms-openai-like", "pydantic-ai-slim[openai]", "llm", "locust"]
NODE = ["openai", "ai", "@ai-sdk/openai-compatible", "zod"]
PRINTED = {  # lines: an answer, JSON by a schema, or another text
    "with_litellm.py": ["answer", "answer"],
    "with_langchain.py": ["answer", "answer", "json"],
    "with_llama_index.py": ["answer", "answer", "True"],
    "with_pydantic_ai.py": ["answer", "json"],
    "with_llm.py": ["answer", "answer"],
    "with_openai.mjs": ["answer", "answer"],
    "with_vercel.mjs": ["answer", "answer", "json"],
}
needs_clients = pytest.mark.skipif(not CLIENTS, reason="installs other programs: VECTORCLM_CLIENTS=all")


def environment(served: Served, folder: Path) -> dict[str, str]:
    offline = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "AI_SDK_LOG_WARNINGS": "false",
        "TIKTOKEN_CACHE_DIR": str(folder),
    }
    return {"BASE_URL": f"{served.url}/v1", "KEY": SECRET, "LLM_USER_PATH": str(folder / "llm"), **offline}


@needs_clients
@pytest.mark.parametrize("script", PRINTED)
def test_a_client_gets_answers_streams_and_json(served: Served, script: str, tmp_path: Path) -> None:
    if script.endswith(".mjs"):
        folder = node_with(NODE)
        shutil.copyfile(SCRIPTS / script, folder / script)
        lines = run_client(["node", folder / script], environment(served, tmp_path), folder)
    else:
        lines = run_client([python_with(PYTHON), SCRIPTS / script], environment(served, tmp_path), tmp_path)
    assert len(lines) == len(PRINTED[script]), lines
    for line, expected in zip(lines, PRINTED[script], strict=True):
        if expected == "json":
            found = json.loads(line)
            assert found["kind"] in ("otter", "owl") and len(found["name"]) <= 12 and found["legs"] <= 99
        else:
            assert line == (ANSWER if expected == "answer" else expected)


@needs_clients
def test_a_load_of_eight_users_is_answered_without_a_failure(served: Served, tmp_path: Path) -> None:
    options = ["--headless", "-u", "8", "-r", "8", "-t", "10s", "--host", served.url, "--json", "--skip-log"]
    command = [python_with(PYTHON), "-m", "locust", "-f", SCRIPTS / "locustfile.py", *options]
    found = json.loads("\n".join(run_client(command, environment(served, tmp_path), tmp_path)))
    (row,) = found
    assert row["num_requests"] > 20 and row["num_failures"] == 0


TASKS = {
    "vc_choice": """task: vc_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "vc_generate": """task: vc_generate
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<stop>"], max_gen_toks: 120, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}


@needs_clients
@pytest.mark.parametrize("kind", ["local-completions", "local-chat-completions"])
def test_the_evaluation_harness_scores_the_server(served: Served, chat_folder: Path, kind: str, tmp_path: Path) -> None:
    """The choices' log-likelihoods through the API give the scores that the harness finds with transformers' model."""
    rows = [
        {"question": "The otter swims by the", "choices": [" lake at night", " boats", " 12"], "answer": ""},
        {"question": "Wer singt im", "choices": [" Wald", " the", " makes 12 boats by the lake"], "answer": ""},
        {"question": "and makes", "choices": [" singt", " 12 boats", " night"], "answer": ""},
    ]
    if kind == "local-chat-completions":
        rows = [{"question": "Who swims?", "choices": [], "answer": ANSWER}]
    name = "vc_choice" if kind == "local-completions" else "vc_generate"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / f"{name}.yaml").write_text(TASKS[name].replace("FILE", str(tmp_path / "rows.jsonl")))
    python = python_with(["lm_eval[api,hf]>=0.4.13,<0.5"])
    path = "chat/completions" if "chat" in kind else "completions"
    same = "max_length=511,add_bos_token=True"  # the harness's own defaults differ between the two
    server = f"model=otter,base_url={served.url}/v1/{path},tokenizer={chat_folder},num_concurrent=2,{same}"
    keyed = {**environment(served, tmp_path), "OPENAI_API_KEY": SECRET, "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def scores(model: str, arguments: str, *more: str) -> dict[str, float]:
        command = [python, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--tasks", name]
        out = tmp_path / model
        run_client([*command, "--include_path", tmp_path, "--output_path", out, *more], keyed, tmp_path)
        (file,) = out.rglob("results_*.json")
        return {key: value for key, value in json.loads(file.read_text())["results"][name].items() if "," in key}

    if kind == "local-completions":
        theirs = scores("hf", f"pretrained={chat_folder},dtype=float32,{same}", "--device", "cpu")
        assert scores(kind, server) == theirs and 0 < theirs["acc,none"] <= 1
    else:
        assert scores(kind, server, "--apply_chat_template")["exact_match,none"] == 1.0


def test_raw_http_is_enough(served: Served) -> None:
    """As `curl` speaks, which most examples on pages use."""
    if shutil.which("curl") is None:
        pytest.skip("no curl here: apt-get install curl")
    body = json.dumps({"model": "otter", "messages": [{"role": "user", "content": "Who swims?"}], "temperature": 0})
    command = ["curl", "-sS", f"{served.url}/v1/chat/completions", "-H", f"Authorization: Bearer {SECRET}", "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "no_proxy": "*"})
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == ANSWER
    streamed = subprocess.run(
        [*command[:-1], body[:-1] + ', "stream": true}'], capture_output=True, text=True, check=True
    )
    assert re.sub(r"data: |\[DONE\]|\n", "", streamed.stdout).count('"delta"') > 5 and "[DONE]" in streamed.stdout
