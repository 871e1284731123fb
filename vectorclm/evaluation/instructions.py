"""How a model follows instructions that a program can check, in the manner of IFEval (Zhou et al., arXiv 2311.07911).

The prompts and the checks are ours. Content and form are counted apart: a form may come by chance from a model that
reads nothing, words that are named in the prompt do not.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from vectorclm.evaluation.instruction_checks import PARTS, Instruction, holds
from vectorclm.evaluation.instruction_prompts import SHOTS
from vectorclm.evaluation.item_scores import ItemScores
from vectorclm.inference.generate import GREEDY, SamplingParams, answer, generate, plain_text
from vectorclm.model import CausalLM
from vectorclm.runtime.progress import Progress
from vectorclm.settings import canonical_json
from vectorclm.shards.conversations import Turn
from vectorclm.tokenizer import BOS_ID, EOS_ID, IM_END_ID, SPECIAL_TOKENS, encode

ANSWERS = "instructions.jsonl"
STOP = "\n\nInstruction:"  # where a base model begins another one


def few_shot(tokenizer: Tokenizer, prompt: str, room: int) -> list[int]:
    """Token ids of an instruction after as many of SHOTS as fit with it in `room` tokens; those after it go first."""
    for kept in range(len(SHOTS), -1, -1):
        parts = [f"Instruction: {shot.prompt}\nAnswer: {answer}" for shot, answer in SHOTS[:kept]]
        ids = [BOS_ID, *encode(tokenizer, "\n\n".join([*parts, f"Instruction: {prompt}\nAnswer:"]))]
        if len(ids) <= room:
            return ids
    return [BOS_ID, *ids[1 - room :]]


def chat_answer(
    model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: SamplingParams = GREEDY
) -> tuple[str, bool]:
    """A chat model's likeliest answer to an instruction, and whether it ended its turn."""
    ids = list(answer(model, tokenizer, [Turn("user", prompt)], max_new_tokens, sampling))
    return plain_text(tokenizer, ids), bool(ids) and ids[-1] == IM_END_ID


def base_answer(
    model: CausalLM, tokenizer: Tokenizer, prompt: str, max_new_tokens: int, sampling: SamplingParams = GREEDY
) -> tuple[str, bool]:
    """A base model's likeliest answer to an instruction in plain text, and whether it ended the text or began another.

    What comes after that is left off.
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
    model: CausalLM,
    tokenizer: Tokenizer,
    asked: Sequence[Instruction],
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    *,
    chat: bool,
    out: Path,
    found: ItemScores,
) -> dict[str, Any]:
    """Answer every prompt, and score the answers as `judge` does; `instructions.jsonl` in `out` has them all.

    A chat model answers in its template, a base model after a few examples of instruction and answer in plain text.
    `ended` counts the answers that the model ended itself, the chat model by its end-of-turn token.
    """
    respond = chat_answer if chat else base_answer
    answers, ended = [], 0
    with Progress("follow instructions", len(asked), "prompts") as progress:
        for instruction in asked:
            said, is_over = respond(model, tokenizer, instruction.prompt, max_new_tokens, sampling)
            answers.append(said)
            ended += is_over
            progress.advance(1)
    with (out / ANSWERS).open("w", encoding="utf-8") as file:
        for (prompt, checks), said in zip(asked, answers, strict=True):
            verdicts = [{"kind": check.kind, "what": check.what, "holds": holds(check, said)} for check in checks]
            file.write(canonical_json({"prompt": prompt, "answer": said, "checks": verdicts}) + "\n")
    return {**judge(asked, answers, found), "ended": ended, "prompts": len(asked)}


def judge(asked: Sequence[Instruction], answers: Sequence[str], found: ItemScores) -> dict[str, Any]:
    """Of the prompts, the share whose answers are as asked, with its standard error.

    `followed_content` looks at what is said alone, `followed_form` at length and format alone (of the prompts that ask
    for any), `followed` at both. Of a prompt all checks must hold (IFEval's strict accuracy by prompt). `checks` has
    for each kind how many held, and of how many. What each prompt scored is added to `found`.
    """
    scores: dict[str, Any] = {}
    for name, counted in PARTS.items():
        right = []
        for number, (instruction, said) in enumerate(zip(asked, answers, strict=True)):
            if checks := [check for check in instruction.checks if check.is_content in counted]:
                right.append(all(holds(check, said) for check in checks))
                content = canonical_json(instruction).encode()
                found.add_question(name, number, content, (right[-1], None), None, texts=[], part=None)
        if right:
            share = sum(right) / len(right)
            stderr = math.sqrt(share * (1 - share) / max(1, len(right) - 1))
            scores[name] = {"share": share, "stderr": stderr, "items": len(right)}
    kinds: dict[str, list[bool]] = {}
    for instruction, said in zip(asked, answers, strict=True):
        for check in instruction.checks:
            kinds.setdefault(check.kind, []).append(holds(check, said))
    scores["checks"] = {kind: {"held": sum(held), "of": len(held)} for kind, held in sorted(kinds.items())}
    return scores
