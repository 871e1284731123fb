"""The commands of `vectorclm bench`.

Some benchmarks take seconds to import, so each command imports its own.
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

Rounds = Annotated[int, Parameter(help="Number of measurements of each side, in turn")]
Mirror = Annotated[Path | None, Parameter(name="--data", help="A local mirror of the hub's text and questions")]
Text = Annotated[Path, Parameter(name="--data", help="A local mirror with the text to train on")]

bench_app = new_app("bench", "Measure this program against its peers, as ratios.")


def _show(rows: Iterable[Row], as_json: bool) -> None:
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("vectorclm.bench.quality").setLevel(logging.INFO)  # progress of trainings, which take minutes
    show(rows, Console(), as_json=as_json)


@bench_app.command(help_epilogue="Example: vectorclm bench orchestration --rounds 3")
def orchestration(*, rounds: Rounds = 3, data: Mirror = None, json: Json = False) -> None:
    """The overhead of Prefect and MLflow."""
    from flows.bench.orchestration import orchestration as rows

    _show(rows(rounds, data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench tracking --rounds 10")
def tracking(*, rounds: Rounds = 3, data: Mirror = None, json: Json = False) -> None:
    """The overhead of logging to MLflow in a training step."""
    from flows.bench.tracking import tracking as rows

    _show(rows(rounds, data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench data --data DIR --store s3://bucket/bench")
def data(
    *,
    rounds: Rounds = 3,
    data: Mirror = None,
    store: Annotated[str | None, Parameter(help="An S3 store, for the rows that read from S3")] = None,
    json: Json = False,
) -> None:
    """Throughput of encoding, shards and data loading."""
    from vectorclm.bench.data import data_layer

    _show(data_layer(rounds, data, store), json)


@bench_app.command(help_epilogue="Example: vectorclm bench workers --data DIR --rounds 1")
def workers(*, rounds: Rounds = 3, data: Mirror = None, json: Json = False) -> None:
    """Stages built by two processes against one."""
    from vectorclm.bench.workers import stages_over_workers

    _show(stages_over_workers(rounds, data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench train --rounds 5")
def train(
    *,
    rounds: Rounds = 3,
    large: Annotated[bool, Parameter(help="Also measure models of 50 million parameters")] = False,
    json: Json = False,
) -> None:
    """A training step against transformers."""
    from vectorclm.bench import training

    _show(training.training(rounds, training.model_sizes(large=large)), json)


@bench_app.command(help_epilogue="Example: vectorclm bench optimizer")
def optimizer(*, rounds: Rounds = 3, json: Json = False) -> None:
    """A step of Muon against torch.optim.Muon."""
    from vectorclm.bench.training import optimizing

    _show(optimizing(rounds), json)


@bench_app.command(help_epilogue="Example: vectorclm bench generate")
def generate(*, rounds: Rounds = 3, json: Json = False) -> None:
    """Autoregressive generation against transformers."""
    from vectorclm.bench.inference import generating

    _show(generating(rounds), json)


@bench_app.command(help_epilogue="Example: vectorclm bench evaluate --data DIR")
def evaluate(*, rounds: Rounds = 3, data: Mirror = None, json: Json = False) -> None:
    """Multiple choice by log-likelihood against lm-evaluation-harness."""
    from vectorclm.bench.inference import evaluating

    _show(evaluating(rounds, data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench gguf --model MODEL --data DIR")
def gguf(
    *,
    model: Annotated[str, Parameter(help="The model: a folder or <store>/<stage>/<fingerprint>")],
    data: Mirror = None,
    json: Json = False,
) -> None:
    """Agreement of a model in llama.cpp with the original."""
    from vectorclm.bench.gguf import same_model

    _show(same_model(model, data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench quality --data DIR")
def quality(*, data: Text, store: StoreUri = LOCAL_STORE, json: Json = False) -> None:
    """Loss from the same tokens: Muon against AdamW, and other design choices."""
    from vectorclm.bench.quality import quality as rows

    _show(rows(Store(store), data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench rates --data DIR")
def rates(*, data: Text, store: StoreUri = LOCAL_STORE, json: Json = False) -> None:
    """Search the learning rates of `base` in short trainings; needs a GPU."""
    from vectorclm.bench.quality import rates as rows

    _show(rows(Store(store), data), json)


@bench_app.command(help_epilogue="Example: vectorclm bench gpu")
def gpu(*, rounds: Rounds = 3, json: Json = False) -> None:
    """A training step and decoding of `base` on a GPU, with a profile."""
    from vectorclm.bench.gpu import gpu as rows

    _show(rows(rounds), json)
