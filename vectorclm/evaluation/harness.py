"""The model class for EleutherAI's lm-evaluation-harness: `simple_evaluate(model=VectorCLM("folder"), tasks=[...])`.

The answers are those of the harness's own Hugging Face backend, token for token, only faster: the tokens that the
choices of an item share are read once, and generation keeps keys and values.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from vectorclm.errors import ConfigError, DataError
from vectorclm.evaluation.bits_per_byte import text_scores
from vectorclm.evaluation.multiple_choice import Likelihood, Pair, log_likelihoods, pair_ids
from vectorclm.inference.config import SamplingParams
from vectorclm.inference.generate import generate, generate_batch
from vectorclm.inference.load import open_model
from vectorclm.inference.model_slices import by_model
from vectorclm.model import CausalLM
from vectorclm.runtime.devices import Runtime
from vectorclm.runtime.progress import Progress
from vectorclm.settings import digest
from vectorclm.shards.conversations import read_conversation, render_prompt
from vectorclm.store.model_ref import find_model
from vectorclm.tokenizer import BOS, BOS_ID, CHAT_TEMPLATE, EOS_ID, IM_END, IM_END_ID, IM_START, PAD_ID, encode

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ConfigError(
        "benchmarks are defined by lm-evaluation-harness, which is not installed: "
        "pip install -c constraints.txt 'vectorclm[eval]'"
    ) from error

NEW_TOKENS = 256  # of an answer, where the task has no limit; as in the harness's own backends
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class VectorCLM(LM):  # type: ignore[misc]
    """A base or chat model at an address that `find_model` knows: a folder, or an artifact in a store.

    `batch_size` counts the questions, or answers, in one forward pass. Raises DataError where there is no model, or the
    tokenizer is another model's.
    """

    def __init__(self, pretrained: str | Path, batch_size: int = 16, runtime: Runtime = Runtime()) -> None:
        super().__init__()
        found = find_model(str(pretrained))
        runtime.check()
        self._device = runtime.configure_torch()
        model, self.tokenizer = open_model(found.local(), found.address)
        self.model, self.batch_size, self.chat = model.to(self._device).eval(), batch_size, found.chat
        self.address, self.content = found.address, found.content
        # Token ids of each prompt in the chat template, control tokens included; and the number of white-space ids at
        # the end, which the harness counts as part of the text that follows.
        self._conversations: dict[str, tuple[list[int], int]] = {}

    @property
    def context(self) -> int:
        """The length of the model's context in tokens."""
        return self.model.config.max_position_embeddings

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[Likelihood]:
        """Log-likelihood of each text after its context in nats, and whether greedy decoding would generate the text.

        Consecutive requests of one item are read together.
        """
        questions = [list(group) for _, group in itertools.groupby(requests, key=lambda request: id(request.doc))]
        pairs = [[self._pair(*request.args) for request in group] for group in questions]
        label = requests[0].task_name or "choices" if requests else "choices"
        answers = log_likelihoods(self.model, pairs, self.batch_size, label)
        found = [answer for group in answers for answer in group]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def _pair(self, context: str, text: str) -> Pair:
        if (conversation := self._conversations.get(context)) is None:
            return pair_ids(self.tokenizer, context, text, self.context)
        ids, spaces = conversation
        scored = encode(self.tokenizer, text)
        return [*ids, *scored][-self.context - 1 :], min(spaces + len(scored), self.context)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats, each read on its own in windows that do not overlap."""
        found = []
        with Progress("evaluate texts", len(requests), "texts") as progress:
            calls = ((request.args[0], self._device) for request in requests)
            scored = by_model(self.model, _text_scores, calls, self.tokenizer)
            for request, scores in zip(requests, scored, strict=True):
                found.append(-scores["nats_per_token"] * scores["tokens"] if scores else 0.0)
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
                progress.advance(1)
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate the continuation of each context, up to the first of the texts that end it.

        A context is cut at its beginning to leave room for the answer; an answer as long as the model's context gets
        half of it. Raises ConfigError for an unknown generation setting.
        """
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        answers, asked = [""] * len(requests), Counter[str]()
        seeds = []
        for request in requests:  # a task may repeat a prompt for several different answers
            seeds.append(_seed(request.args[0], asked[request.args[0]]))
            asked[request.args[0]] += 1
        with Progress("evaluate answers", len(requests), "answers") as progress:
            for numbers in by_settings.values():
                settings = Generation.of(requests[numbers[0]].args[1], self.context)
                prompts = {i: self._prompt(requests[i].args[0], self.context - settings.new_tokens) for i in numbers}
                numbers.sort(key=lambda i: -len(prompts[i]))  # alike in length: little padding
                groups = [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]
                calls = (([prompts[i] for i in group], [seeds[i] for i in group]) for group in groups)
                answered = by_model(self.model, _answers, calls, self.tokenizer, self.chat, settings)
                for group, texts in zip(groups, answered, strict=True):
                    for i, text in zip(group, texts, strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    progress.advance(len(group))
        return answers

    def _prompt(self, context: str, room: int) -> list[int]:
        conversation = self._conversations.get(context)
        return (conversation[0] if conversation else [BOS_ID, *encode(self.tokenizer, context)])[-room:]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as one text, and remember its token ids for when the text comes back as a context.

        Raises DataError for a base model, which has not learned a template.
        """
        if not self.chat:
            raise DataError(f"{self.address} is a base model and knows no chat template: ask it without one")
        turns = read_conversation(chat_history, "the conversation")
        begun = "" if add_generation_prompt else turns.pop().content
        text = "".join(f"{IM_START}{turn.role}\n{turn.content}{IM_END}\n" for turn in turns)
        text = f"{BOS}{text}{IM_START}assistant\n{begun}"
        ids, last = [*render_prompt(self.tokenizer, turns), *encode(self.tokenizer, begun)], f"assistant\n{begun}"
        spaces = len(encode(self.tokenizer, last)) - len(encode(self.tokenizer, last.rstrip()))
        self._conversations[text] = ids, spaces
        return text

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness's cache of requests: the model's content."""
        return self.content

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The chat template in transformers' form, for the harness's records."""
        return CHAT_TEMPLATE if self.chat and chat_template else ""


class Generation(NamedTuple):
    """The generation settings of a task."""

    until: list[str]
    new_tokens: int
    sampling: SamplingParams | None  # None: the likeliest tokens

    @classmethod
    def of(cls, asked: Mapping[str, Any], context: int) -> "Generation":
        """Parse the harness's `generation_kwargs`. Raises ConfigError for an unknown one."""
        known = normalize_gen_kwargs(dict(asked), NEW_TOKENS)
        until, new_tokens, sampled = known.pop("until"), known.pop("max_gen_toks"), known.pop("do_sample")
        if unknown := sorted(known.keys() - set(SAMPLED)):
            raise ConfigError(f"generation here has no {', '.join(unknown)}: it knows {', '.join(SAMPLED)}")
        new_tokens = new_tokens if new_tokens < context else context // 2
        return cls([stop for stop in until if stop], new_tokens, SamplingParams(**known) if sampled else None)


def _answers(
    model: CausalLM,
    tokenizer: Tokenizer,
    chat: bool,
    settings: Generation,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
) -> list[str]:
    """Generate an answer to each prompt, up to the first of the texts that end it; a sampled one by its seed."""
    device = model.model.embed_tokens.weight.device
    stop_ids = (IM_END_ID, EOS_ID) if chat else (EOS_ID,)

    def ended(ids: Sequence[int]) -> bool:
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
        return any(stop in text for stop in settings.until)

    rows: list[list[int]] = []
    if settings.sampling is not None:
        for prompt, seed in zip(prompts, seeds, strict=True):
            rows.append([])
            sampling = settings.sampling.model_copy(update={"seed": seed})
            sampled = generate(model, prompt, settings.new_tokens, stop_ids=stop_ids, sampling=sampling)
            for token in sampled:
                rows[-1].append(token)
                if ended(rows[-1]):
                    break
    else:
        longest = max(map(len, prompts))
        padded = [[PAD_ID] * (longest - len(prompt)) + prompt for prompt in prompts]
        padding = [longest - len(prompt) for prompt in prompts]
        generated = generate_batch(
            model,
            torch.tensor(padded, device=device),
            settings.new_tokens,
            stop_ids=stop_ids,
            padding_B=torch.tensor(padding, device=device) if any(padding) else None,
            finished=lambda made_BN: torch.tensor([ended(row) for row in made_BN.tolist()], device=device),
        )
        rows = generated.tolist()
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    return [_cut(text, settings.until) for text in texts]


def _text_scores(model: CausalLM, tokenizer: Tokenizer, text: str, device: torch.device) -> dict[str, float] | None:
    return text_scores(model, tokenizer, text, device) if text else None


def _seed(context: str, number: int) -> int:
    """The seed of the answer to a context that was asked `number` times before, so that scores are reproducible."""
    return int(digest([context, number])[:15], 16)


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string."""
    for stop in until:
        text = text.partition(stop)[0]
    return text
