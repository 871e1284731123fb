"""Text of one's own becomes a model: the page's lines in an experiment, on a terminal, without a network."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from flows.cli import main
from tests.test_curriculum import SHRUNK, states
from tests.test_pages import PAGES, fenced
from vectorclm.config import load_experiment
from vectorclm.corpus.sample_reader import read_texts
from vectorclm.corpus.synthetic_world import WorldConfig
from vectorclm.corpus.synthetic_world import rows as rows_of
from vectorclm.store.layout import STAGES

# Where the system lets users take the network away, all but the loopback's is.
APART = ["unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]


def own_experiment(folder: Path) -> tuple[Path, list[str]]:
    """`small` with the page's lines in place of its sources, files as those lines say, and settings for a minute."""
    (lines,) = fenced(PAGES["vectorclm/corpus/README.md"], "toml")
    blocks = load_experiment("small")[1].read_text().split("\n\n")
    kept = [block for block in blocks if not re.match(r"\[\[(sample\.sources|chat\.sources|evaluate\.tasks)", block)]
    text = re.sub(r"^weights = .*$", "", "\n\n".join(kept), flags=re.MULTILINE).replace(
        'name = "small"', 'name = "own"'
    )
    (folder / "own.toml").write_text(text + "\n" + lines.replace('"/', f'"{folder}/'))
    world = WorldConfig(seed=4, documents=900, conversations=300)
    for source, rows in (("sample", rows_of(world, "stories")), ("chat", rows_of(world, "chat-messages"))):
        (place,) = re.findall(rf'\[\[{source}\.sources]].*?data_files = "/(.*?)"', lines, re.DOTALL)
        file = folder / place.replace("*", "own")
        file.parent.mkdir(exist_ok=True)
        wanted = [{"body": row["text"]} if "text" in row else {"messages": row["messages"]} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in wanted))
    smaller = {key: value for key, value in SHRUNK.items() if not re.match(r"name|chat\.sources|evaluate\.tasks", key)}
    smaller |= {"sample.bytes": 200_000, "sample.validation_share": 0.1, "finetune.epochs": 0.2}
    smaller |= {"evaluate.instructions": 0}
    return folder / "own.toml", [part for key, value in smaller.items() for part in ("--set", f"{key}={value}")]


def on_a_terminal(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The command as a person has it, with its standard error on a terminal."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    apart = APART if shutil.which("ip") and not subprocess.run([*APART, "true"], capture_output=True).returncode else []
    screen, terminal = os.openpty()

    def read() -> str:
        text = b""
        with suppress(OSError):  # the terminal is closed
            while part := os.read(screen, 4096):
                text += part
        os.close(screen)
        return text.decode(errors="replace")

    with ThreadPoolExecutor(1) as other:
        shown = other.submit(read)
        command = [*apart, sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(command, env=clean, stdout=subprocess.PIPE, stderr=terminal, text=True, check=False)
        os.close(terminal)
        done.stderr = shown.result()
    return done


def test_your_own_text_becomes_a_model_by_the_lines_of_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, changes = own_experiment(tmp_path)
    command = [str(experiment), *changes, "--store", str(tmp_path / "store"), "--json"]
    assert main(["run", *command, "--dry-run"]) == 0
    wanted = json.loads(capsys.readouterr().out)["stages"]
    done = on_a_terminal("run", *command, "--threads", "1")
    assert states(done) == dict.fromkeys(STAGES, "built")
    result = json.loads(done.stdout)
    assert {name: stage["fingerprint"] for name, stage in result["stages"].items()} == wanted
    assert set(result["scores"]["base"]["bits_per_byte"]) == {"own"} and result["scores"]["multiple_choice"] is None
    texts = {
        json.loads(line)["body"] for file in tmp_path.glob("texts/*.jsonl") for line in file.read_text().splitlines()
    }
    drawn = list(read_texts(Path(result["stages"]["sample"]["uri"]) / "own", "train"))
    assert len(drawn) > 100 and set(drawn) < texts
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", done.stderr)
    bars = {"sample", "tokenizer", "shards", "chat_shards", "pretrain", "finetune", "answer prompts"}
    assert bars <= set(re.findall(r"([a-z_ ]*[a-z]) +[━╸╺]", plain))
