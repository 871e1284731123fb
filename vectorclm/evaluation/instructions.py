"""Instruction following, scored by checks of a program in the manner of IFEval (Zhou et al., arXiv 2311.07911).

The prompts and the checks are ours. Content and form are counted apart: a model that ignores the prompt can meet a form
by chance, but not the words that the prompt names.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vectorclm.evaluation.instruction_checks import PARTS, Instruction, holds
from vectorclm.evaluation.instruction_prompts import SHOTS
from vectorclm.evaluation.item_scores import ItemScore, ItemScores
from vectorclm.evaluation.statistics import share_stderr
from vectorclm.inference.config import GREEDY, SamplingParams
from vectorclm.inference.generate import answer, generate, plain_text
from vectorclm.inference.model_slices import by_model
from vectorclm.model import CausalLM
from vectorclm.runtime.progress import Progress
from vectorclm.settings import canonical_json
from vectorclm.shards.conversations import Turn
from vectorclm.tokenizer import BOS_ID, EOS_ID, IM_END_ID, SPECIAL_TOKENS, encode

Respond = Callable[..., tuple[str, bool]]  # of a model and a `prompt`
ANSWERS = "instructions.jsonl"
STOP = "\n\nInstruction:"  # where a base model begins another instruction


def few_shot(tokenizer: Tokenizer, prompt: str, room: int) -> list[int]:
    """Token ids of an instruction after as many of SHOTS as fit in `room` tokens; the last ones are left out first."""
    for kept in range(len(SHOTS), -1, -1):
        parts = [f"Instruction: {shot.prompt}\nAnswer: {answer}" for shot, answer in SHOTS[:kept]]
        ids = [BOS_ID, *encode(tokenizer, "\n\n".join([*parts, f"Instruction: {prompt}\nAnswer:"]))]
        if len(ids) <= room:
            return ids
    return [BOS_ID, *ids[1 - room :]]


def chat_answer(
    model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: SamplingParams = GREEDY
) -> tuple[str, bool]:
    """A chat model's likeliest answer to an instruction in its template, and whether the model ended its turn."""
    ids = list(answer(model, tokenizer, [Turn("user", prompt)], max_new_tokens, sampling))
    return plain_text(tokenizer, ids), bool(ids) and ids[-1] == IM_END_ID


def base_answer(
    model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: SamplingParams = GREEDY
) -> tuple[str, bool]:
    """A base model's likeliest answer to an instruction, after a few examples of instruction and answer in plain text.

    The second value says whether the model ended the text or began another instruction, which is cut off.
    """
    context = model.config.max_position_embeddings
    max_new_tokens = min(max_new_tokens, context // 2)
    ids, text = list[int](), ""
    examples = few_shot(tokenizer, prompt, context - max_new_tokens)
    for token in generate(model, examples, max_new_tokens, sampling=sampling):
        if token == EOS_ID:
            return text, True
        ids += [token] if token >= len(SPECIAL_TOKENS) else []
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if STOP in text:
            return text[: text.index(STOP)], True
    return text, False


def instruction_scores(
    model: CausalLM, respond: Respond, asked: Sequence[Instruction], out: Path, found: ItemScores
) -> dict[str, Any]:
    """Answer every prompt, and score the answers as `judge` does; `instructions.jsonl` in `out` has all of them.

    `respond` returns the model's answer to a prompt and whether the model ended the answer itself, as `chat_answer` and
    `base_answer` do. `ended` counts the answers that the model ended.
    """
    answers, ended = [], 0
    with Progress("follow instructions", len(asked), "prompts") as progress:
        prompts = ((instruction.prompt,) for instruction in asked)
        for text, is_over in by_model(model, _respond, prompts, respond):
            answers.append(text)
            ended += is_over
            progress.advance(1)
    with (out / ANSWERS).open("w", encoding="utf-8") as file:
        for (prompt, checks), text in zip(asked, answers, strict=True):
            verdicts = [{"kind": check.kind, "what": check.what, "holds": holds(check, text)} for check in checks]
            file.write(canonical_json({"prompt": prompt, "answer": text, "checks": verdicts}) + "\n")
    return {**judge(asked, answers, found), "ended": ended, "prompts": len(asked)}


def _respond(model: CausalLM, respond: Respond, prompt: str) -> tuple[str, bool]:
    return respond(model, prompt=prompt)


def judge(asked: Sequence[Instruction], answers: Sequence[str], found: ItemScores) -> dict[str, Any]:
    """The share of prompts whose answers are as asked, with the standard error.

    `followed_content` counts the content alone, `followed_form` length and format alone (of the prompts that ask for
    a form), `followed` both. All checks of a prompt must hold (IFEval's strict accuracy by prompt). `checks` has the
    number of checks that held for each kind, and of how many. The score of each prompt is added to `found`.
    """
    scores: dict[str, Any] = {}
    for name, counted in PARTS.items():
        right = []
        for number, (instruction, text) in enumerate(zip(asked, answers, strict=True)):
            if checks := [check for check in instruction.checks if check.is_content in counted]:
                right.append(all(holds(check, text) for check in checks))
                content = canonical_json(instruction).encode()
                found.add_question(name, number, ItemScore(content, right[-1], None, None), part=None)
        if right:
            share = sum(right) / len(right)
            scores[name] = {"share": share, "stderr": share_stderr(share, len(right)), "items": len(right)}
    kinds: dict[str, list[bool]] = {}
    for instruction, text in zip(asked, answers, strict=True):
        for check in instruction.checks:
            kinds.setdefault(check.kind, []).append(holds(check, text))
    scores["checks"] = {kind: {"held": sum(held), "of": len(held)} for kind, held in sorted(kinds.items())}
    return scores
