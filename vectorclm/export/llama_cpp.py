"""Run a GGUF file in llama.cpp, to compare llama.cpp's answers and scores with ours."""

import secrets
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation.bits_per_byte import comparable_length, rates, scoring_windows
from vectorclm.formats.gguf_files import read_gguf_fields
from vectorclm.formats.templates import render
from vectorclm.runtime.progress import Progress
from vectorclm.tokenizer import CHAT_TEMPLATE

INSTALL = "pip install 'vectorclm[llama]'"
PROBE = [{"role": role, "content": "Hello"} for role in ("user", "assistant", "user")]  # a conversation
SURE = 1000.0  # bias on a logit that forces a token


class LlamaCpp:
    """A GGUF file in llama.cpp's own server, inside this process and on 127.0.0.1, with a key of its own.

    Keys, values and attention are in fp32, so that differences from our figures come from the file. Raises ConfigError
    where llama.cpp is not installed, DataError for a file that llama.cpp cannot open.
    """

    def __init__(self, file: Path, threads: int = 1) -> None:
        if find_spec("xllamacpp") is None:
            raise ConfigError(f"llama.cpp is not installed: {INSTALL}")
        import xllamacpp

        fields = _fields(file)
        self.file, self.template = file, str(fields.get("tokenizer.chat_template") or "")
        self._check_template(PROBE)  # llama.cpp renders it as it starts
        self.longest = comparable_length(int(fields["llama.context_length"]))  # tokens of the longest prompt
        self.vocab_size = int(fields["llama.vocab_size"])
        params = xllamacpp.CommonParams()
        params.model.path, params.port, params.verbosity = str(file), 0, 0
        params.n_parallel, params.n_ctx = 1, self.longest + 1  # the server needs room after a prompt
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup = False
        key = secrets.token_urlsafe(24)  # else every user of this machine, and every page in a browser, may ask
        params.api_keys = [key]
        try:
            self._server = xllamacpp.Server(params)  # ends with this object
        except RuntimeError as error:
            raise DataError(f"{file}: llama.cpp cannot open it: {error}") from error
        headers = {"Authorization": f"Bearer {key}"}
        self._client = httpx.Client(base_url=self._server.listening_address, headers=headers, timeout=600)
        self._letter = self.tokenize("a")[0]

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text` without BOS; with `special`, the text of a special token becomes that token."""
        body = {"content": text, "add_special": False, "parse_special": special}
        return list(self._ask("/tokenize", body)["tokens"])

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._ask("/detokenize", {"tokens": list(ids)})["content"])

    def prompt(self, messages: Sequence[dict[str, str]]) -> str:
        """Messages in the file's chat template, up to the beginning of an answer; llama.cpp itself adds the BOS."""
        self._check_template(messages)
        return str(self._ask("/apply-template", {"messages": list(messages)})["prompt"])

    def greedy(self, input_ids: Sequence[int], count: int) -> list[int]:
        """Greedy continuation of `input_ids`: up to `count` ids, until an end of text or of a turn."""
        return list(self._complete(input_ids, n_predict=count)["tokens"])

    def log_probability(self, input_ids: Sequence[int], token: int) -> float:
        """Natural logarithm of the probability of `token` after `input_ids`."""
        # The bias forces the token; the server reports its probability without the bias.
        found = self._complete(input_ids, n_predict=1, logit_bias=[[token, SURE]], n_probs=1)
        if chosen := found.get("completion_probabilities"):
            return float(chosen[0]["logprob"])
        # The server omits the probability of a token that ends inside a character: force a letter and list all tokens.
        found = self._complete(input_ids, n_predict=1, logit_bias=[[self._letter, SURE]], n_probs=self.vocab_size)
        listed = found["completion_probabilities"][0]["top_logprobs"]
        return next(float(one["logprob"]) for one in listed if one["id"] == token)

    def _check_template(self, messages: Sequence[dict[str, str]]) -> None:
        """Raise DataError where the file's chat template leaves its budget: llama.cpp's own engine has none."""
        if self.template not in ("", CHAT_TEMPLATE):
            render(self.template, messages, str(self.file))

    def text_scores(self, text: str) -> dict[str, float]:
        """Bits per byte and the other scores of `bits_per_byte.text_scores`, in windows of `longest` tokens.

        Raises DataError for an empty text.
        """
        ids = self.tokenize(text)
        if not ids:
            raise DataError("there is no text to score: the file is empty")
        nats = 0.0
        with Progress("evaluate text", len(ids), "tokens") as progress:
            for window, scored in scoring_windows(ids, self.longest):
                for place in range(scored, len(window)):
                    nats -= self.log_probability(window[:place], window[place])
                    progress.advance(1)
        return rates(nats, len(ids), len(text.encode()))

    def _complete(self, input_ids: Sequence[int], **options: Any) -> Any:
        body = {"prompt": list(input_ids), "temperature": 0, "samplers": ["temperature"], "return_tokens": True}
        return self._ask("/completion", body | options)

    def _ask(self, path: str, body: dict[str, Any]) -> Any:
        answer = self._client.post(path, json=body)
        if answer.is_error:
            raise DataError(f"llama.cpp refuses {path}: {answer.text[:300]}")
        return answer.json()


def _fields(file: Path) -> dict[str, Any]:
    """The metadata of a GGUF file. Raises DataError where the file contains no Llama model."""
    found = read_gguf_fields(file)
    if any(type(found.get(f"llama.{name}")) is not int for name in ("context_length", "vocab_size")):
        raise DataError(f"{file} contains no Llama model")
    return found
