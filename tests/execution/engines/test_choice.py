"""The settings of an engine: in no fingerprint, refused in one line where they contradict, checked before work."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.execution.engines.choice import ENGINES, check_engine, on_nodes, with_workers
from tests.test_curriculum import mini, run_cli
from vectorclm.errors import ConfigError
from vectorclm.runtime.devices import Runtime
from vectorclm.settings import validate
from vectorclm.store.layout import STAGES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": [1, 2]}, "engine local is one machine, and cannot start 2 nodes: set engine to srun or ray"),
        ({"engine": "ray", "nodes": [3, 2]}, r"nodes is the fewest and the most, as in \[1, 4\], and not \[3, 2\]"),
        ({"engine": "srun", "nodes": [0, 2]}, r"and not \[0, 2\]"),
        ({"engine": "slurm"}, "engine: Input should be 'local', 'srun' or 'ray'"),
        ({"engine": "ray", "nodes": [2]}, "nodes.1: Field required"),
    ],
)
def test_a_contradiction_is_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(Runtime, values, "the settings")
    assert len(str(caught.value).splitlines()) == 2


def test_engine_and_nodes_are_in_no_fingerprint(tmp_path: Path) -> None:
    """Shown by a dry run with them and without."""
    experiment = tmp_path / "mini.json"
    experiment.write_text(mini().model_dump_json())
    command = ["run", str(experiment), "--dry-run", "--json", "--store", str(tmp_path / "store")]
    here, there = (
        json.loads(run_cli(*command, *options).stdout)
        for options in ([], ["--engine", "ray", "--nodes", "1", "4", "--processes", "8"])
    )
    assert here["stages"] == there["stages"]
    assert set(here["stages"]) == set(STAGES)


@pytest.mark.parametrize(
    ("engine", "environment", "message"),
    [
        ("srun", {}, "engine srun works inside a Slurm job"),
        ("ray", {}, "engine ray needs the head's address: set RAY_ADDRESS=HOST:PORT"),
        ("ray", {"RAY_ADDRESS": "10.0.0.1:6379"}, "engine ray needs the cluster's token: set RAY_AUTH_TOKEN"),
    ],
)
def test_what_an_engine_lacks_is_refused_before_work(
    engine: str, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    experiment, store = tmp_path / "mini.json", tmp_path / "store"
    experiment.write_text(mini().model_dump_json())
    options = ["--store", str(store), "--engine", engine, "--nodes", "1", "2"]
    done = run_cli("run", str(experiment), *options, HOME=str(tmp_path), **environment)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == done.stderr.splitlines()[-1:]
    assert message in done.stderr
    assert not (store / "sample").exists()


def test_the_job_holds_all_that_a_node_needs(tmp_path: Path) -> None:
    experiment = tmp_path / "experiment.json"
    experiment.write_text("{}")
    for engine, program in ENGINES.items():
        runtime = validate(Runtime, {"engine": engine, "nodes": [1, 2]}, engine)
        command = on_nodes(runtime, ["-m", "vectorclm", "pretrain", "experiment.json"], experiment)
        assert command[:3] == [sys.executable, "-m", program.__name__]
        job = json.loads(Path(command[3]).read_text())
        assert job["stage"] == ["-m", "vectorclm", "pretrain", "experiment.json"]
        assert job["files"] == {"experiment.json": "{}", "runtime.json": runtime.model_dump_json()}


def test_a_data_set_is_built_by_the_program_of_the_engine() -> None:
    runtime = validate(Runtime, {"engine": "ray"}, "ray")
    command = with_workers(runtime, ["-m", "vectorclm", "shards", "experiment.json", "--relay"])
    assert command[1:] == ["-m", ENGINES["ray"].__name__, "shards", "experiment.json", "--relay"]


def test_the_engine_of_one_machine_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "RAY_"))]:
        monkeypatch.delenv(name)
    check_engine(Runtime())


def test_the_engines_are_short() -> None:
    """Code, without documentation and blank lines."""
    files = sorted(Path(__file__).parents[3].glob("flows/execution/engines/*.py"))
    assert len(files) > 3
    assert sum(map(_code_lines, files)) <= 250


def _code_lines(path: Path) -> int:
    import ast

    tree = ast.parse(path.read_text())
    documented = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(path.read_text().splitlines(), 1)
    return sum(1 for number, line in lines if number not in documented and line.strip() and line.strip()[0] != "#")
