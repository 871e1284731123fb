"""MLflow's database beside a store: locked, foreign, unreadable, moved."""

import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from flows.cli import main
from flows.tracking import database
from flows.tracking.registry import Registry
from flows.tracking.tracker import Tracker
from tests.services.platform import until
from tests.tracking.conftest import client, tracker
from vectorclm.config import ExperimentConfig
from vectorclm.store.artifact import Store


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("begin exclusive")
        yield


@contextmanager
def foreign(path: Path) -> Iterator[None]:
    path.unlink()
    with closing(sqlite3.connect(path)) as other:
        other.execute("create table recipes (name text)")
        other.commit()
    yield
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("select name from sqlite_master").fetchall() == [("recipes",)]  # nothing was added


@contextmanager
def garbage(path: Path) -> Iterator[None]:
    path.write_bytes(b"no database at all, but long enough to be taken for one" * 20)
    yield


@contextmanager
def folder(path: Path) -> Iterator[None]:
    path.unlink()
    path.mkdir()
    yield


Fault = Callable[[Path], AbstractContextManager[None]]
FAULTS: dict[Fault, str] = {
    locked: "is locked by another program",
    foreign: "is not MLflow's database: it holds recipes",
    garbage: "is not a readable SQLite database",
    folder: "cannot be used",
}


@pytest.fixture
def copied(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store with a database of MLflow."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.1)
    monkeypatch.setattr("flows.tracking.outbox.AWAY_SECONDS", 0.1)
    Registry(store)
    place = tmp_path / "first place"
    place.mkdir()
    shutil.copy(Path(store.root, "mlflow.db"), place / "mlflow.db")
    return Store(str(place))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_database_that_cannot_be_used_is_one_line_and_stops_no_curriculum(
    copied: Store,
    experiment: ExperimentConfig,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
) -> None:
    capsys.readouterr()
    with fault(Path(copied.root, "mlflow.db")):
        for command in ("lineage", "promote"):
            assert main([command, "models:/vectorclm-chat@candidate", "--store", copied.uri]) != 0
            said = capsys.readouterr().err.strip()
            assert FAULTS[fault] in said and len(said.splitlines()) == 1
        with caplog.at_level(logging.WARNING, "flows.tracking.tracker"), tracker(copied, experiment, "on") as told:
            pass
        assert "curriculum" not in told.run_ids
    warned = [record.getMessage() for record in caplog.records if record.name == "flows.tracking.tracker"]
    assert len(warned) == 1 and FAULTS[fault] in warned[0] and "goes on without it" in warned[0]


def test_a_lock_that_ends_costs_no_record(
    copied: Store, experiment: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        with locked(Path(copied.root, "mlflow.db")):
            told = stack.enter_context(tracker(copied, experiment, "patient"))
            until(lambda: "is locked by another program" in caplog.text, "the lock is noticed", 60)
        until(lambda: "curriculum" in told.run_ids, "its run is open", 60)
    (run,) = client(copied).search_runs([told.experiment_id])
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_store_that_was_moved_or_copied_keeps_its_records_beside_itself(
    copied: Store, experiment: ExperimentConfig, tmp_path: Path, how: Callable[[str, str], object]
) -> None:
    after = Store(str(tmp_path / "second place"))
    with tracker(copied, experiment, "moving") as told:
        told.report("the first page")
    how(copied.root, after.root)
    files = sorted(Path(copied.root).rglob("*"))
    with Tracker(after, told.experiment, told.plans) as again:
        again.report("the second page")
    assert sorted(Path(copied.root).rglob("*")) == files
    for run, page in ((told, "the first page"), (again, "the second page")):
        read = Path(client(after).download_artifacts(run.run_ids["curriculum"], "report.html"))
        assert read.read_text() == page
