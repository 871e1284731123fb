"""Chat templates of foreign models: rendered in a process of their own, with a budget of time, memory and output.

Jinja's sandbox keeps a template from the interpreter; it does not keep it from looping or from joining texts without
end.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vectorclm.errors import DataError
from vectorclm.formats.files import read_bytes
from vectorclm.formats.limits import TEMPLATE_CHARACTERS, TEMPLATE_MEMORY, TEMPLATE_OUTPUT, TEMPLATE_SECONDS

WAIT = 30  # seconds until a process that got no processor is ended
# The process limits itself before it reads the template, and ends with its text or with a line about the error.
RENDERER = """
import json, resource, sys
seconds, memory, output = map(int, sys.argv[1:])
from jinja2 import TemplateError
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
given = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
def fail(message):
    raise TemplateError(str(message)[:200])
try:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension])
    environment.globals["raise_exception"] = fail
    text, size = [], 0
    for part in environment.from_string(given["template"]).generate(**given["values"]):
        size += len(part)
        if size > output:
            raise ValueError(f"it writes more than {output:,} characters")
        text.append(part)
    answer = {"text": "".join(text)}
except MemoryError:
    answer = {"error": f"it takes more than {memory >> 20} MiB"}
except Exception as error:
    answer = {"error": f"{type(error).__name__}: {error}"[:300]}
json.dump(answer, sys.stdout)
"""


def read_template(path: Path) -> str:
    """The text of a file of a chat template. Raises DataError where it is too large or not UTF-8."""
    try:
        return read_bytes(path, TEMPLATE_CHARACTERS, "a chat template").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a chat template: {error}") from error


def render(template: str, messages: Sequence[Mapping[str, str]], where: str, **values: Any) -> str:
    """The text of messages in a chat template, up to the beginning of an answer.

    Raises DataError, naming `where`, for a template that fails or leaves its budget: TEMPLATE_SECONDS of processor
    time, TEMPLATE_MEMORY, TEMPLATE_OUTPUT characters beyond those of the messages.
    """
    if len(template) > TEMPLATE_CHARACTERS:
        raise DataError(f"{where}: the chat template has more than {TEMPLATE_CHARACTERS:,} characters")
    given = {"messages": list(messages), "add_generation_prompt": True, "bos_token": "", "eos_token": "", **values}
    size = sum(len(text) for message in messages for text in message.values())
    limits = map(str, (TEMPLATE_SECONDS, TEMPLATE_MEMORY + 64 * size, TEMPLATE_OUTPUT + size))
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", RENDERER, *limits],
            input=json.dumps({"template": template, "values": given}).encode(),
            capture_output=True,
            timeout=WAIT,
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{where}: the chat template takes more than {WAIT} seconds") from error
    if done.returncode:
        raise DataError(
            f"{where}: the chat template takes more than {TEMPLATE_SECONDS} seconds or "
            f"{TEMPLATE_MEMORY // 2**20} MiB (ended by {-done.returncode})"
        )
    answer: dict[str, str] = json.loads(done.stdout)
    if "error" in answer:
        raise DataError(f"{where}: the chat template fails: {answer['error']}")
    return answer["text"]
