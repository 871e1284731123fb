"""Sampling with a KV cache, and answers in the chat template."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vectorclm.inference.config import GREEDY, SamplingParams
from vectorclm.inference.decode import decoding
from vectorclm.inference.grammar import Grammar
from vectorclm.inference.model_slices import by_model
from vectorclm.model import CausalLM
from vectorclm.runtime.progress import Progress
from vectorclm.shards.conversations import Turn, render_prompt
from vectorclm.tokenizer import BOS_ID, EOS_ID, IM_END_ID, PAD_ID, SPECIAL_TOKENS, encode

LOOK = 8  # tokens between two calls of `finished`
COLDEST = 1e-6  # a lower temperature takes the likeliest token: divided logits could overflow


def generate(
    model: CausalLM,
    input_ids: Sequence[int],
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] = (EOS_ID,),
    sampling: SamplingParams = GREEDY,
) -> Iterator[int]:
    """Generate token ids after `input_ids`, one at a time, the stop token included; ends where the context is full."""
    sampler = Sampler(sampling, input_ids)
    room = model.config.max_position_embeddings - len(input_ids)
    model.eval()
    device = model.model.embed_tokens.weight.device
    next_logits = decoding(model, 1, min(len(input_ids) + max_new_tokens, model.config.max_position_embeddings))
    fed = torch.tensor([list(input_ids)], device=device)
    for _ in range(min(max_new_tokens, room)):
        with torch.inference_mode():
            chosen = sampler.draw(next_logits(fed)[0])
        yield chosen
        if chosen in stop_ids:
            return
        fed = torch.tensor([[chosen]], device=device)


@torch.inference_mode()
def generate_batch(
    model: CausalLM,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] = (EOS_ID,),
    padding_B: Tensor | None = None,
    finished: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Greedy continuations [B, N] of prompts [B, T]; a row is padding after its stop token.

    Shorter prompts are padded at the left, by `padding_B` tokens. Generation ends when all rows have ended, after
    `max_new_tokens`, or where the model's context is full. Every LOOK tokens, `finished` takes the continuations
    [B, n] and returns which rows [B] need no more tokens.
    """
    model.eval()
    batch, prompt = input_ids.shape
    end = min(prompt + max_new_tokens, model.config.max_position_embeddings)
    next_logits = decoding(model, batch, end, padding_B)
    made = input_ids.new_full((batch, end - prompt), PAD_ID)
    stops = torch.tensor(stop_ids, dtype=torch.long, device=input_ids.device)
    over = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    fed = input_ids
    for place in range(end - prompt):
        chosen_B = next_logits(fed).argmax(dim=1)
        made[:, place] = chosen_B.masked_fill(over, PAD_ID)
        if len(stop_ids):
            over |= torch.isin(chosen_B, stops)
        if finished is not None and place % LOOK == LOOK - 1:
            over |= finished(made[:, : place + 1])
        if over.all():
            return made[:, : place + 1]
        fed = chosen_B[:, None]
    return made


class Sampler:
    """Draws the tokens of one answer, one after another."""

    def __init__(self, sampling: SamplingParams, prompt: Sequence[int], grammar: Grammar | None = None) -> None:
        """Begin after a prompt of token ids; with a `grammar`, only tokens that it allows are drawn."""
        self.sampling, self.grammar = sampling, grammar
        self.seen = list(prompt)
        self.generator = torch.Generator()  # on the CPU, so that a seed draws alike whatever the model's device
        self.generator.seed() if sampling.seed is None else self.generator.manual_seed(sampling.seed)

    def draw(self, logits_V: Tensor) -> int:
        """The next token, from the logits [V] after the tokens so far."""
        logits_V = logits_V.float()
        if self.grammar is not None:
            logits_V = self.grammar.mask(logits_V)
        chosen = choose(logits_V, self.seen, self.sampling, self.generator)
        if self.grammar is not None:
            self.grammar.accept(chosen)
        self.seen.append(chosen)
        return chosen


def choose(logits_V: Tensor, seen: Sequence[int], sampling: SamplingParams, generator: torch.Generator) -> int:
    """Sample the next token after `seen` from logits [V]; the steps have the order of transformers."""
    if sampling.repetition_penalty != 1:
        logits_V = penalized(logits_V, seen, sampling.repetition_penalty)
    if sampling.temperature < COLDEST:
        return int(logits_V.argmax())
    logits_V = logits_V.cpu() / sampling.temperature
    if sampling.top_k:
        logits_V = keep_top_k(logits_V, sampling.top_k)
    if sampling.top_p < 1:
        logits_V = keep_top_p(logits_V, sampling.top_p)
    if sampling.min_p:
        logits_V = keep_min_p(logits_V, sampling.min_p)
    return int(torch.multinomial(logits_V.softmax(dim=0), 1, generator=generator))


def penalized(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Logits with a repetition penalty on the tokens seen (Keskar et al., CTRL, arXiv 1909.05858, section 4.1).

    Special tokens are exempt, because each turn has to end, however many turns ended before.
    """
    ids = torch.tensor(sorted({i for i in seen if i >= len(SPECIAL_TOKENS)}), dtype=torch.long, device=logits_V.device)
    chosen = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def keep_top_k(logits_V: Tensor, k: int) -> Tensor:
    """Top-k: keep the logits of the `k` most likely tokens and of ties, set the others to -inf (arXiv 1805.04833)."""
    least = logits_V.topk(min(k, len(logits_V))).values[-1]
    return logits_V.masked_fill(logits_V < least, -torch.inf)


def keep_top_p(logits_V: Tensor, p: float) -> Tensor:
    """Top-p (nucleus): keep the fewest tokens with a total probability of `p`, others -inf (arXiv 1904.09751)."""
    probabilities, ids = logits_V.softmax(dim=0).sort(descending=True)
    outside = probabilities.cumsum(dim=0) - probabilities >= p
    outside[0] = False  # the most likely token always stays
    return logits_V.masked_fill(torch.empty_like(outside).index_copy(0, ids, outside), -torch.inf)


def keep_min_p(logits_V: Tensor, p: float) -> Tensor:
    """Min-p: keep tokens at least `p` times as probable as the most likely one, others -inf (arXiv 2407.01082)."""
    probabilities = logits_V.softmax(dim=0)
    return logits_V.masked_fill(probabilities < p * probabilities.max(), -torch.inf)


def drop_oldest(tokenizer: Tokenizer, turns: Sequence[Turn], length: int) -> list[Turn]:
    """Shorten a conversation to a prompt of `length` tokens: drop the oldest questions and their answers.

    The system turn and the last question stay, even where these alone are longer.
    """
    kept = list(turns)
    first = 1 if kept and kept[0].role == "system" else 0
    while len(kept) > first + 2 and len(render_prompt(tokenizer, kept)) > length:
        del kept[first : first + 2]
    return kept


def cut_prompt(tokenizer: Tokenizer, turns: Sequence[Turn], length: int) -> list[int]:
    """The prompt of a conversation, cut to at most `length` tokens without asking anyone.

    The oldest questions are dropped first, as in a chat. The system turn is dropped where the last question leaves no
    room for it, as in training. A question that is too long by itself loses its beginning.
    """
    kept = drop_oldest(tokenizer, turns, length)
    prompt = render_prompt(tokenizer, kept)
    if len(prompt) > length and kept[0].role == "system":
        prompt = render_prompt(tokenizer, kept[1:])
    return prompt if len(prompt) <= length else [BOS_ID, *prompt[1 - length :]]


def answer(
    model: CausalLM,
    tokenizer: Tokenizer,
    conversation: Sequence[Turn],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
) -> Iterator[int]:
    """Token ids of the assistant's next turn, its end-of-turn token included.

    An answer takes at most half of the context; a conversation that is too long for the rest is cut by `cut_prompt`.
    """
    context = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, context // 2)
    prompt = cut_prompt(tokenizer, conversation, context - max_new_tokens)
    yield from generate(model, prompt, max_new_tokens, stop_ids=(IM_END_ID, EOS_ID), sampling=sampling)


def plain_text(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """The text of tokens, without special tokens."""
    text: str = tokenizer.decode([i for i in ids if i >= len(SPECIAL_TOKENS)], skip_special_tokens=False)
    return text


def answer_text(
    model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: SamplingParams = GREEDY
) -> str:
    """The answer to one question, without the end-of-turn token."""
    return plain_text(tokenizer, answer(model, tokenizer, [Turn("user", prompt)], max_new_tokens, sampling))


def continuation(
    model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: SamplingParams = GREEDY
) -> str:
    """The continuation of a text, or of the end of a long one; at most half the model's context."""
    context = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, context // 2)
    prompt_ids = [BOS_ID, *encode(tokenizer, prompt)[1 + max_new_tokens - context :]]
    return plain_text(tokenizer, generate(model, prompt_ids, max_new_tokens, sampling=sampling))


def template_scores(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[Sequence[Turn], str]],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
) -> dict[str, int]:
    """Count the answers to held-out prompts that end with the end-of-turn token, and those in the chat template.

    An answer in the template is some text, then the end-of-turn token, without other special tokens. `exact` counts
    the answers equal to the reference, which only questions with one right wording can reach.
    """
    ended = in_template = exact = 0
    with Progress("answer prompts", len(prompts), "prompts") as progress:
        calls = ((conversation,) for conversation, _ in prompts)
        answers = by_model(model, _whole_answer, calls, tokenizer, max_new_tokens, sampling)
        for (_, reference), ids in zip(prompts, answers, strict=True):
            body = ids[:-1]
            finished = bool(ids) and ids[-1] == IM_END_ID
            ended += finished
            text: str = tokenizer.decode(body, skip_special_tokens=False)
            in_template += finished and bool(text.strip()) and all(i >= len(SPECIAL_TOKENS) for i in body)
            exact += finished and text == reference
            progress.advance(1)
    return {"prompts": len(prompts), "ended": ended, "answered_in_template": in_template, "exact": exact}


def _whole_answer(
    model: CausalLM, tokenizer: Tokenizer, longest: int, sampling: SamplingParams, turns: Sequence[Turn]
) -> list[int]:
    return list(answer(model, tokenizer, turns, longest, sampling))
