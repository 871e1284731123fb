"""Names of the stages, and of the other folders of a store: checkpoints, measurements and curves."""

import re
from typing import Literal, get_args

CURVES = "curves"
MEASURE = "measure"
STEP = re.compile(r"step-([0-9]+)(-[0-9a-f]{8})?")  # a checkpoint: step number, and the attempt that wrote it

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

# What the store asks about stages, which it cannot ask the table: a checkpoint's key does not name its stage, and only
# an export names the experiment. Every training is here, the later ones last.
TRAINED: tuple[StageName, ...] = ("pretrain", "finetune")
EXPORT: StageName = "export"
