"""The commands of `vectorclm bench`: what is asked reaches the measurement, and its rows are printed.

Measurements take minutes, so most of them are replaced; `bench train` and its like run whole in tests of their own.
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli import main
from vectorclm.bench.table import Row, could_not_run
from vectorclm.store.artifact import Store

ROWS = [Row("fast", 2.0, 1.0, 2.0, "tokens/s", 1.5, True, "3 rounds"), could_not_run("far", "s", 1.0, "no server")]


@pytest.mark.parametrize(
    ("command", "measurement", "arguments"),
    [
        ("orchestration --rounds 5 --data DIR", "flows.bench.orchestration.orchestration", (5, Path("DIR"))),
        ("orchestration", "flows.bench.orchestration.orchestration", (3, None)),
        ("tracking --rounds 2", "flows.bench.tracking.tracking", (2, None)),
        ("data --data DIR --store s3://b/p", "vectorclm.bench.data.data_layer", (3, Path("DIR"), "s3://b/p")),
        ("workers --rounds 1 --data DIR", "vectorclm.bench.workers.stages_over_workers", (1, Path("DIR"))),
        ("optimizer --rounds 1", "vectorclm.bench.training.optimizing", (1,)),
        ("generate", "vectorclm.bench.inference.generating", (3,)),
        ("evaluate --data DIR", "vectorclm.bench.inference.evaluating", (3, Path("DIR"))),
        ("gguf --model M --data DIR", "vectorclm.bench.gguf.same_model", ("M", Path("DIR"))),
        ("quality --data DIR --store S", "vectorclm.bench.quality.quality", ("S", Path("DIR"))),
        ("rates --data DIR --store S", "vectorclm.bench.quality.rates", ("S", Path("DIR"))),
    ],
)
def test_what_is_asked_reaches_the_measurement_and_is_printed(
    command: str,
    measurement: str,
    arguments: tuple[Any, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[object] = []

    def measured(*given: object) -> Iterator[Row]:
        asked.extend(Path(one.root).name if isinstance(one, Store) else one for one in given)
        yield from ROWS

    module, _, name = measurement.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, measured)
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["bench", *command.split(), "--json"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["name"], first["ratio"], first["met"]) == ("fast", 2.0, True)
    assert (second["name"], second["met"], second["why"]) == ("far", None, "no server")
    assert tuple(asked) == arguments
    assert main(["bench", *command.split()]) == 0
    table = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [(row[0].strip(), row[-2].strip()) for row in table] == [("fast", "yes"), ("far", "not run")]


def test_large_models_are_trained_only_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vectorclm.bench import training

    sizes: list[int] = []

    def measured(rounds: int, models: list[training.Size]) -> Iterator[Row]:
        sizes.append(len(models))
        yield from ROWS

    monkeypatch.setattr(training, "training", measured)
    assert main(["bench", "train"]) == main(["bench", "train", "--large"]) == 0
    assert sizes[0] < sizes[1] and "fast" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures the GPU for minutes")
def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows and all(row["met"] is None and "no GPU" in row["why"] for row in rows)
