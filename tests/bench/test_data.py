"""The bench of the data runs whole on a little text, and what it says of a plan is right."""

import io
import json
from importlib.util import find_spec

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from tests.conftest import skip_or_fail
from vectorclm.bench.data import data_layer, walked
from vectorclm.bench.reading import FAULTS, FETCHED, LITDATA, REMOTE
from vectorclm.bench.table import Row, bounded, show
from vectorclm.shards.config import MIX_BLOCK
from vectorclm.shards.order import MixturePhase, TrainingOrder


def test_every_row_is_an_object_with_the_agreed_keys() -> None:
    written = io.StringIO()
    show(data_layer(1, None, text_bytes=400_000), Console(file=written), as_json=True)
    rows = {row["name"]: row for row in map(json.loads, written.getvalue().splitlines())}
    assert all(set(row) - {"why"} == {"name", "ours", "peer", "ratio", "unit", "ask", "met"} for row in rows.values())
    idle = {REMOTE, FAULTS, FETCHED}
    idle |= {LITDATA} if find_spec("litdata") is None else set()
    assert len(rows) == 15
    for name in idle:
        assert rows[name]["met"] is None and rows[name]["why"]
    encoding, training = rows["encode against encode_batch_fast"], rows["BPE training against tokenizers"]
    if find_spec("gigatoken") is None:
        skip_or_fail("pip install -c constraints.txt gigatoken")
    assert encoding["why"].startswith("0 of ") and "documents differ; 0.4 MB of the generated world" in encoding["why"]
    assert training["why"].startswith("251 of 251 merges are the same")  # 512 tokens, less 256 bytes and 5 special ones
    assert rows["repeats before exhaustion"]["met"] is True
    assert "0 of " in rows["padding of windows"]["why"] and " 0 tokens dropped" in rows["padding of windows"]["why"]
    measured = [row for name, row in rows.items() if name not in idle]
    assert all(row["ours"] is not None and row["met"] in (True, False) for row in measured)


def test_a_plan_is_walked_to_its_end() -> None:
    even = [MixturePhase(3 * MIX_BLOCK, {"a": 0.75, "b": 0.25}), MixturePhase(2 * MIX_BLOCK, {"a": 0.5, "b": 0.5})]
    mixture, repeats = walked(TrainingOrder(even, {"a": 900, "b": 5000}, seed=1, windows_per_block=8))
    assert mixture.ours == 0 and mixture.met and repeats.ours == 0 and repeats.met
    assert "sources are read up to 3.70 times" in repeats.why
    thirds = [MixturePhase(30 * MIX_BLOCK, {"a": 1.0, "b": 2.0})]  # a third of a mix block is no whole number
    mixture, _ = walked(TrainingOrder(thirds, {"a": 9000, "b": 9000}, seed=1, windows_per_block=8))
    assert mixture.ours == pytest.approx(1 / 3, abs=1e-3) and mixture.met


class Careless(TrainingOrder):
    """Draws its sources by chance, and a window whenever it comes."""

    def locate(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        generator = np.random.default_rng(len(places))
        return generator.integers(0, 2, len(places)), generator.integers(0, 900, len(places))


def test_a_plan_that_strays_is_found_out() -> None:
    even = [MixturePhase(8 * MIX_BLOCK, {"a": 0.5, "b": 0.5})]
    mixture, repeats = walked(Careless(even, {"a": 900, "b": 900}, seed=1, windows_per_block=8))
    assert mixture.ours is not None and mixture.ours > 1 and mixture.met is False
    assert repeats.ours is not None and repeats.ours > 1000 and repeats.met is False


def test_a_bound_is_met_at_the_bound_and_not_above() -> None:
    row = bounded("x", [4.0, 5.0, 9.0], "ms", 5)
    assert row == Row("x", 5.0, None, 1.0, "ms", 1.0, True, "asked: at most 5; 4 to 9, 3 rounds")
    assert bounded("x", [6.0], "ms", 5).met is False
    assert bounded("x", [0], "windows", 0).met is True
    assert bounded("x", [1], "windows", 0).met is False
