"""Names of the stages, and of the other folders of a store: measurements and curves."""

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
