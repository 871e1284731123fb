"""The command `bench`: what is measured beside what peers, or without one.

Some of it takes seconds to import, so only a bench that needs it does.
"""

import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from vectorclm.bench.table import Row, show
from vectorclm.command_line import LOCAL_STORE, Json, StoreUri, new_app
from vectorclm.store.artifact import Store

Rounds = Annotated[int, Parameter(help="How often each side is measured, in turn")]
Mirror = Annotated[Path | None, Parameter(name="--data", help="A local mirror to read text and questions from")]
Text = Annotated[Path, Parameter(name="--data", help="A local mirror with text, which is trained on")]

bench_app = new_app("bench", "Measure this program beside its peers, as ratios.")


def _show(rows: Iterable[Row], as_json: bool) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("vectorclm.bench.quality").setLevel(logging.INFO)  # each training takes its time
    show(rows, Console(), as_json=as_json)


@bench_app.command(help_epilogue="Example: vectorclm bench orchestration --rounds 3")
def orchestration(*, rounds: Rounds = 3, data: Mirror = None, json: Json = False) -> None:
    """What Prefect and MLflow cost."""
    from flows.bench.orchestration import orchestration as rows

    _show(rows(rounds, data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench tracking --rounds 10")
def tracking(*, rounds: Rounds = 3, data: Mirror = None, json: Json = False) -> None:
    """What logging to MLflow takes of a training step."""
    from flows.bench.tracking import tracking as rows

    _show(rows(rounds, data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench data --data DIR --store s3://bucket/bench")
def data(
    *,
    rounds: Rounds = 3,
    data: Mirror = None,
    store: Annotated[str | None, Parameter(help="An S3 store, for the rows that read from one")] = None,
    json: Json = False,
) -> None:
    """Encoding, shards and the order of the data."""
    from vectorclm.bench.data import data_layer

    _show(data_layer(rounds, data, store), json)


@bench_app.command(help_epilogue="Example: vectorclm bench train --rounds 5")
def train(
    *,
    rounds: Rounds = 3,
    large: Annotated[bool, Parameter(help="The models of fifty million parameters, too")] = False,
    json: Json = False,
) -> None:
    """A training step beside transformers."""
    from vectorclm.bench import training

    _show(training.training(rounds, training.model_sizes(large=large)), json)


@bench_app.command(help_epilogue="Example: vectorclm bench optimizer")
def optimizer(*, rounds: Rounds = 3, json: Json = False) -> None:
    """Muon's step beside torch's."""
    from vectorclm.bench.training import optimizing

    _show(optimizing(rounds), json)


@bench_app.command(help_epilogue="Example: vectorclm bench generate")
def generate(*, rounds: Rounds = 3, json: Json = False) -> None:
    """Tokens generated one after the other, beside transformers."""
    from vectorclm.bench.inference import generating

    _show(generating(rounds), json)


@bench_app.command(help_epilogue="Example: vectorclm bench evaluate --data DIR")
def evaluate(*, rounds: Rounds = 3, data: Mirror = None, json: Json = False) -> None:
    """Multiple choice by log-likelihood, beside the harness."""
    from vectorclm.bench.inference import evaluating

    _show(evaluating(rounds, data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench gguf --model MODEL --data DIR")
def gguf(
    *,
    model: Annotated[str, Parameter(help="A folder or <store>/<stage>/<fingerprint>, whose files are compared")],
    data: Mirror = None,
    json: Json = False,
) -> None:
    """A model in llama.cpp, and whether it is the same."""
    from vectorclm.bench.gguf import same_model

    _show(same_model(model, data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench quality --data DIR")
def quality(*, data: Text, store: StoreUri = LOCAL_STORE, json: Json = False) -> None:
    """What is learned from the same tokens: Muon beside AdamW, and other decisions."""
    from vectorclm.bench.quality import quality as rows

    _show(rows(Store(store), data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench rates --data DIR")
def rates(*, data: Text, store: StoreUri = LOCAL_STORE, json: Json = False) -> None:
    """The best learning rates of `base` in short trainings, and what follows for it; for a GPU."""
    from vectorclm.bench.quality import rates as rows

    _show(rows(Store(store), data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench gpu")
def gpu(*, rounds: Rounds = 3, json: Json = False) -> None:
    """A step and decoding of `base` on a GPU, and where the time goes."""
    from vectorclm.bench.gpu import gpu as rows

    _show(rows(rounds), json)
