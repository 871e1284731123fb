"""Sampling with a KV cache, answers in the chat template, and a conversation in the terminal."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vectorclm.finetune import Turn, render_prompt
from vectorclm.model import CausalLM
from vectorclm.progress import Progress
from vectorclm.train_tokenizer import BOS_ID, EOS_ID, IM_END_ID, SPECIAL_TOKENS, encode


def generate(
    model: CausalLM,
    input_ids: Sequence[int],
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] = (EOS_ID,),
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """New token ids after `input_ids`, one at a time, the stopping one included.

    Temperature 0 takes the likeliest token; else tokens are drawn from the smallest set that holds `top_p` of the
    probability (nucleus sampling, Holtzman et al., arXiv 1904.09751). Ends where the model's context is full.
    """
    room = model.config.max_position_embeddings - len(input_ids)
    model.eval()
    device = model.model.embed_tokens.weight.device
    cache = model.new_cache(1, min(len(input_ids) + max_new_tokens, model.config.max_position_embeddings))
    fed = torch.tensor([list(input_ids)], device=device)
    for _ in range(min(max_new_tokens, room)):
        with torch.inference_mode():
            logits_V = model(fed, cache)[0, -1].float()
            chosen = _choose(logits_V, temperature, top_p, generator)
        yield chosen
        if chosen in stop_ids:
            return
        fed = torch.tensor([[chosen]], device=device)


def _choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities, ids = (logits_V / temperature).softmax(dim=0).sort(descending=True)
    outside = probabilities.cumsum(dim=0) - probabilities >= top_p
    probabilities = probabilities.masked_fill(outside, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def answer(
    model: CausalLM, tokenizer: Tokenizer, conversation: Sequence[Turn], max_new_tokens: int, **sampling: Any
) -> Iterator[int]:
    """Token ids of the assistant's next turn, its end-of-turn token included."""
    prompt = render_prompt(tokenizer, conversation)
    limit = model.config.max_position_embeddings - max_new_tokens
    if len(prompt) > limit > 1:
        prompt = [BOS_ID, *prompt[-(limit - 1) :]]  # the oldest of a long conversation is forgotten
    yield from generate(model, prompt, max_new_tokens, stop_ids=(IM_END_ID, EOS_ID), **sampling)


def answer_text(model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> str:
    """The likeliest answer to one question, without the end-of-turn token."""
    ids = list(answer(model, tokenizer, [Turn("user", prompt)], max_new_tokens))
    text: str = tokenizer.decode([i for i in ids if i >= len(SPECIAL_TOKENS)], skip_special_tokens=False)
    return text


def continuation(model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int) -> str:
    """The likeliest continuation of a text."""
    ids = list(generate(model, [BOS_ID, *encode(tokenizer, prompt)], max_new_tokens))
    text: str = tokenizer.decode([i for i in ids if i >= len(SPECIAL_TOKENS)], skip_special_tokens=False)
    return text


def template_scores(
    model: CausalLM, tokenizer: Tokenizer, prompts: Sequence[tuple[Sequence[Turn], str]], max_new_tokens: int
) -> dict[str, int]:
    """Of held-out prompts, how many answers end in the end-of-turn token, and how many of them stay in the template.

    In the template: some text, then the end-of-turn token, and no other special token. `exact` counts the answers
    equal to the reference, which only questions with one right wording can reach.
    """
    ended = in_template = exact = 0
    with Progress("answer prompts", len(prompts), "prompts") as progress:
        for conversation, reference in prompts:
            ids = list(answer(model, tokenizer, conversation, max_new_tokens))
            body = ids[:-1]
            finished = bool(ids) and ids[-1] == IM_END_ID
            ended += finished
            text: str = tokenizer.decode(body, skip_special_tokens=False)
            in_template += finished and bool(text.strip()) and all(i >= len(SPECIAL_TOKENS) for i in body)
            exact += finished and text == reference
            progress.advance(1)
    return {"prompts": len(prompts), "ended": ended, "answered_in_template": in_template, "exact": exact}


def chat(model: CausalLM, tokenizer: Tokenizer, temperature: float, top_p: float, max_new_tokens: int) -> None:
    """Talk in the terminal until an empty line or end of input; each answer appears as it is made."""
    conversation: list[Turn] = []
    while True:
        try:
            question = input("you  > ").strip()
        except EOFError:
            return
        if not question:
            return
        conversation.append(Turn("user", question))
        text = ""
        print("model> ", end="", flush=True)  # noqa: T201
        ids: list[int] = []
        for token in answer(model, tokenizer, conversation, max_new_tokens, temperature=temperature, top_p=top_p):
            if token < len(SPECIAL_TOKENS):
                break
            ids.append(token)
            whole: str = tokenizer.decode(ids, skip_special_tokens=False)
            if not whole.endswith("\ufffd"):  # a character's bytes may still be on their way
                print(whole[len(text) :], end="", flush=True)  # noqa: T201
                text = whole
        print()  # noqa: T201
        conversation.append(Turn("assistant", text))
