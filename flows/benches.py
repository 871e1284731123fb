"""The command `bench`: what is measured beside what peers, or without one.

Some of it takes seconds to import, so only a bench that needs it does.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from vectorclm.artifact import Store, default_store
from vectorclm.errors import ConfigError

BENCHES = {
    "orchestration": "what Prefect and MLflow cost",
    "data": "encoding, shards and the order of the data",
    "train": "a training step",
    "optimizer": "Muon's step",
    "generate": "tokens made one after the other",
    "evaluate": "multiple choice by log-likelihood",
    "tracking": "what logging to MLflow takes of a training step",
    "gguf": "a model in llama.cpp, and whether it is the same",
    "quality": "what is learned from the same tokens: Muon beside AdamW, and other decisions",
    "rates": "the best learning rates of `base` in short trainings, and what follows for it; for a GPU",
    "gpu": "a step and decoding of `base` on a GPU, and where the time goes",
}


def add_command(commands: Any, default: str) -> None:
    """Add `bench` to the subparsers of a command line; what it keeps is by default in the store `default`."""
    parser = commands.add_parser("bench", help="measure this program beside its peers, as ratios")
    parser.add_argument("what", choices=list(BENCHES), help="; ".join(f"{k}: {v}" for k, v in BENCHES.items()))
    parser.add_argument("--model", metavar="MODEL", help="gguf: a folder or <store>/<stage>/<fingerprint>")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each side, in turn (%(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a local mirror to read text and questions from")
    parser.add_argument(
        "--store",
        metavar="URI",
        help="data: an S3 store, for the rows that read from one; quality, rates: any store, which keeps the trainings "
        f"({default})",
    )
    parser.add_argument("--large", action="store_true", help="train: the models of fifty million parameters too")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")


def command(args: argparse.Namespace) -> int:
    """Print the rows of a bench. Raises ConfigError where it lacks what it measures."""
    from flows.flowbench import orchestration
    from flows.trackbench import tracking
    from vectorclm import inferencebench, qualitybench, trainbench
    from vectorclm.bench import Row, show
    from vectorclm.databench import data_layer
    from vectorclm.ggufbench import same_model
    from vectorclm.gpubench import gpu

    if args.what in ("quality", "rates") and args.data is None:
        raise ConfigError(f"bench {args.what} needs --data DIR, a mirror with text: it trains on that")
    if args.what == "gguf" and args.model is None:
        raise ConfigError("bench gguf needs --model MODEL, whose files it compares")
    rows: dict[str, Callable[[], Iterable[Row]]] = {
        "orchestration": lambda: orchestration(args.rounds, args.data),
        "tracking": lambda: tracking(args.rounds, args.data),
        "data": lambda: data_layer(args.rounds, args.data, args.store),
        "train": lambda: trainbench.training(args.rounds, trainbench.model_sizes(large=args.large)),
        "optimizer": lambda: trainbench.optimizing(args.rounds),
        "generate": lambda: inferencebench.generating(args.rounds),
        "evaluate": lambda: inferencebench.evaluating(args.rounds, args.data),
        "gguf": lambda: same_model(args.model, args.data),
        "quality": lambda: qualitybench.quality(Store(args.store or default_store()), args.data),
        "rates": lambda: qualitybench.rates(Store(args.store or default_store()), args.data),
        "gpu": lambda: gpu(args.rounds),
    }
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("vectorclm.qualitybench").setLevel(logging.INFO)  # each training takes its time
    show(rows[args.what](), Console(), as_json=args.json)
    return 0
