"""A mirror of the hub's sets with generated text, for tests without the real one."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from vectorclm.corpus.synthetic_world import WorldConfig, rows
from vectorclm.evaluation.harness_tasks import definitions


def write_mirror(folder: Path) -> None:
    """The generated world, as the files that `small` looks for in a mirror."""
    world, other = (WorldConfig(seed=seed, documents=600, conversations=120) for seed in (1, 2))
    for place, name in {
        "pretrain/fineweb-edu-like": "lessons",
        "pretrain/cosmopedia-like/stories": "stories",
        "pretrain/cosmopedia-like/textbooks_NC": "lessons",
        "sft/smoltalk-like": "chat-messages",
        "sft/slimorca-like": "chat-turns",
        "sft/tulu3-code-like": "chat-code",
    }.items():
        (folder / place).mkdir(parents=True)
        pq.write_table(
            pa.Table.from_pylist(rows(other if "textbooks" in place else world, name)),
            folder / place / "train-00000-of-00001.parquet",
        )
    lines: dict[str, list[dict[str, object]]] = {
        "hellaswag_val": [], "arc_easy_validation": [], "piqa_valid": [], "blimp_all_67": []
    }  # fmt: skip
    paradigms = [name.removeprefix("blimp_") for name in definitions("blimp")]
    for number, row in enumerate(rows(world, "questions")[:70]):
        context, choices, answer = row["context"], [choice.strip() for choice in row["choices"]], row["answer"]
        wrong = choices[(answer + 1) % len(choices)]
        lines["hellaswag_val"] += [{"activity_label": "A", "ctx": context, "endings": choices, "label": answer}]
        options = {"text": choices, "label": list("ABCD")}
        lines["arc_easy_validation"] += [{"question": context, "choices": options, "answerKey": "ABCD"[answer]}]
        lines["piqa_valid"] += [{"goal": context, "sol1": choices[answer], "sol2": wrong, "label": 0}]
        pair = {"sentence_good": f"{context} {choices[answer]}", "sentence_bad": f"{context} {wrong}"}
        lines["blimp_all_67"] += [{**pair, "UID": paradigms[number % len(paradigms)]}]
    (folder / "eval").mkdir()
    for name, made in lines.items():
        packed = zstandard.ZstdCompressor().compress("".join(json.dumps(line) + "\n" for line in made).encode())
        (folder / f"eval/{name}.jsonl.zst").write_bytes(packed)
