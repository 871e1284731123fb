"""The records of a platform that was copied elsewhere name the new place: in MLflow, in Prefect and in reports."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flows.platform.config import PlatformConfig
from flows.platform.ownership import remember
from flows.platform.relocation import Names, RelocationError, follow, moved
from flows.tracking.pyfunc_model import find_model
from tests.services.curricula import Recorded
from vectorclm.store.artifact import Store

PORTS = {"prefect_port": 14200, "mlflow_port": 15000}
PAGE = "http://127.0.0.1:4200/runs/flow-run/1"


def mentions(database: Path, place: str) -> list[str]:
    """The columns of a database in which a place is named."""
    found = []
    with sqlite3.connect(database) as opened:
        for (table,) in opened.execute("select name from sqlite_master where type = 'table'").fetchall():
            for _, column, *_ in opened.execute(f"pragma table_info('{table}')").fetchall():
                asked = f"""select count(*) from "{table}" where instr(cast("{column}" as text), ?) > 0"""
                if opened.execute(asked, (place,)).fetchone()[0]:
                    found.append(f"{table}.{column}")
    return found


def test_a_copy_of_a_platform_names_its_own_place(recorded: Recorded, tmp_path: Path) -> None:
    """As with the commands of the page, but without servers: the old place is still there, and stays as it is."""
    old, new = recorded.store.root, tmp_path / "a new place"
    shutil.copytree(old, new)
    for name in (".prefect", "reports", "platform"):
        (new / name).mkdir()
    with sqlite3.connect(new / ".prefect" / "prefect.db") as prefect:
        prefect.execute("create table artifact (data json, description text)")
        prefect.execute("create table deployment_schedule (parameters json)")
        prefect.execute("insert into deployment_schedule values (?)", (json.dumps({"model": f"{old}/finetune/12"}),))
        prefect.execute("insert into artifact values (?, ?)", (json.dumps(f"[report]({PAGE})"), "of a run"))
    (new / "reports" / "a.html").write_text(f'<a href="{PAGE}">{old}/export/1</a>')
    of_server = new / "mlartifacts" / "7" / "models" / "m-1" / "artifacts" / "MLmodel"
    of_server.parent.mkdir(parents=True)
    of_server.write_text(f"uri: {old}/finetune/12")
    about = {"store": old, "home": old, "prefect_page": "http://127.0.0.1:4200", "mlflow_page": "http://127.0.0.1:5000"}
    (new / "platform" / "about.json").write_text(json.dumps(about))
    for path in (new / "platform", new / "platform" / "about.json"):
        path.chmod(0o700)
    before = mentions(new / "mlflow.db", old)
    assert {"tags.value", "model_versions.storage_location", "datasets.dataset_source", "runs.artifact_uri"} <= {
        *before
    }

    config = PlatformConfig(vectorclm_store=str(new), **PORTS)
    lines = follow(config)
    assert f"records follow from {old} to {new}" in lines and len(lines) == 3
    assert mentions(new / "mlflow.db", old) == [] and mentions(Path(old, "mlflow.db"), str(new)) == []
    for file in [*(new / "mlartifacts").rglob("*"), *(new / "reports").rglob("*")]:
        assert file.is_dir() or old.encode() not in file.read_bytes(), file
    assert of_server.read_text() == f"uri: {new}/finetune/12"
    assert f'href="http://127.0.0.1:14200/runs/flow-run/1">{new}/export/1<' in (new / "reports" / "a.html").read_text()
    with sqlite3.connect(new / ".prefect" / "prefect.db") as prefect:
        ((data, description),) = prefect.execute("select data, description from artifact").fetchall()
        ((parameters,),) = prefect.execute("select parameters from deployment_schedule").fetchall()
    assert json.loads(parameters) == {"model": f"{new}/finetune/12"}
    assert (json.loads(data), description) == ("[report](http://127.0.0.1:14200/runs/flow-run/1)", "of a run")
    remember(config)
    assert moved(config) == {} and follow(config) == []

    client = MlflowClient(f"sqlite:///{new}/mlflow.db")
    version = client.get_model_version_by_alias("vectorclm-chat", "candidate")
    assert version.tags["uri"].startswith(f"{new}/finetune/") and find_model(version.tags["uri"]).chat
    (parent,) = client.search_runs(["1"], "tags.stage = 'finetune'", max_results=1)
    assert parent.info.artifact_uri is not None and "a%20new%20place" in parent.info.artifact_uri
    assert all(artifact.verify() is None for artifact in Store(str(new)).finished("finetune"))


def test_only_a_platform_that_was_moved_is_followed(tmp_path: Path) -> None:
    one = PlatformConfig(vectorclm_store=str(tmp_path / "one"), vectorclm_home=str(tmp_path / "home"))
    assert moved(one) == {}  # a new platform
    remember(one)
    assert moved(one) == {}
    other = one.model_copy(update={"vectorclm_store": str(tmp_path / "two")})
    assert moved(other) == {}  # a second store in the same home
    ports = one.model_copy(update={"prefect_port": 14200, "vectorclm_mlflow_url": "https://mlflow.example.org"})
    assert moved(ports) == {
        "http://127.0.0.1:4200": "http://127.0.0.1:14200",
        "http://127.0.0.1:5000": "https://mlflow.example.org",
    }
    shutil.copytree(tmp_path / "home", tmp_path / "copy")
    copy = PlatformConfig(vectorclm_store="s3://bucket/prefix", vectorclm_home=str(tmp_path / "copy"))
    assert moved(copy) == {
        str(tmp_path / "one"): "s3://bucket/prefix",
        str(tmp_path / "home"): str(tmp_path / "copy"),
    }
    about = tmp_path / "copy" / "platform" / "about.json"
    about.write_text(json.dumps({"store": "/data/store"}))  # as an earlier version wrote it, without the home
    assert moved(copy) == {}
    plain = PlatformConfig(vectorclm_store=str(tmp_path / "copy"))
    assert moved(plain) == {"/data/store": str(tmp_path / "copy")}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/data/store", "/srv/süd"),
        ("in `/data/store`: /data/store/finetune/12.", "in `/srv/süd`: /srv/süd/finetune/12."),
        ("file:///data/store/mlartifacts/1", "file:///srv/s%C3%BCd/mlartifacts/1"),
        ('{"uri": "/data/store/x"}', '{"uri": "/srv/süd/x"}'),
        ("/data/store2 /data/store-2 /data/store.bak /backup/data/store", None),
        ("http://127.0.0.1:42001/a", None),
        ("http://127.0.0.1:4200/a http://127.0.0.1:5000.", "http://127.0.0.1:5000/a http://127.0.0.1:4200."),
    ],
)
def test_whole_names_are_replaced_in_one_pass(before: str, after: str | None) -> None:
    one, other = "http://127.0.0.1:4200", "http://127.0.0.1:5000"
    names = Names({"/data/store": "/srv/süd", one: other, other: one})
    assert names(before) == (before if after is None else after)
    assert Names({"/dütä": "/neu"})('"/d\\u00fct\\u00e4/x"') == '"/neu/x"'  # as JSON writes it


def test_what_was_done_before_a_failure_is_not_done_twice(tmp_path: Path) -> None:
    """Two addresses have changed roles: a second change would undo the first one."""
    config = PlatformConfig(vectorclm_store=str(tmp_path), prefect_port=5000, mlflow_port=4200)
    remember(config.model_copy(update={"prefect_port": 4200, "mlflow_port": 5000}))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("create table tags (value text)")
        database.execute("insert into tags values (?)", (PAGE,))
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "prefect.db").write_text("this is no database")
    for _ in range(2):
        with pytest.raises(RelocationError, match=r"prefect\.db"):
            follow(config)
    (tmp_path / ".prefect" / "prefect.db").unlink()
    follow(config)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("select value from tags").fetchall() == [(PAGE.replace("4200", "5000"),)]
    assert [file.name for file in (tmp_path / "platform").iterdir()] == ["about.json"]


def test_a_database_that_cannot_be_changed_is_named(tmp_path: Path) -> None:
    config = PlatformConfig(vectorclm_store=str(tmp_path), **PORTS)
    remember(config.model_copy(update={"prefect_port": 4200}))
    (tmp_path / "mlflow.db").write_text("this is no database")
    with pytest.raises(
        RelocationError, match=r"mlflow\.db still name the place from which they were copied: file is not"
    ):
        follow(config)
