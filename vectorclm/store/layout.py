"""The folders of a store: one for each stage, one for measurements, one for curves."""

from typing import Literal, get_args

CURVES = "curves"
MEASURE = "measure"


StageName = Literal[
    "sample",
    "tokenizer",
    "shards",
    "chat_shards",
    "pretrain",
    "evaluate_base",
    "finetune",
    "evaluate",
    "export",
]


STAGES: tuple[str, ...] = get_args(StageName)
