"""Follow a platform that was moved or copied to another place: its records name the store, the home and the pages.

MLflow keeps addresses of files, of artifacts and of pages in its database and in the files of its models; Prefect in
the artifacts of its runs; a report in its links. `up` remembers the place of the platform in its home, so it notices
that a copy of the home, of the store and of both databases was restored elsewhere, or has other ports.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from sqlalchemy import Engine, create_engine, inspect, text
from sqlalchemy.exc import SQLAlchemyError

from flows.platform.config import PlatformConfig
from flows.platform.ownership import before
from flows.tracking.database import ARTIFACTS, artifacts_destination, relocate
from vectorclm.errors import VectorCLMError
from vectorclm.store.artifact import Store
from vectorclm.store.storage import Storage

MLFLOW = {  # tables, with the columns of texts that name places
    "experiments": ("artifact_location",),
    "experiment_tags": ("value",),
    "runs": ("artifact_uri",),
    "tags": ("value",),
    "datasets": ("dataset_source",),
    "logged_models": ("artifact_location",),
    "logged_model_tags": ("tag_value",),
    "registered_models": ("description",),
    "model_versions": ("description", "source", "storage_location"),
    "model_version_tags": ("value",),
}
PREFECT = {
    "artifact": ("data", "description"),
    "artifact_collection": ("data", "description"),
    "deployment": ("parameters",),
    "deployment_schedule": ("parameters",),
    "flow_run": ("parameters",),  # of a model by its address, for Retry
}
PROGRESS = "relocation.json"  # in the folder of the services, while records are changed
MODEL_FILES = ("MLmodel", "artifact.json")  # the files of a logged model that name its artifact
Places = Mapping[str, str]  # what a place was called, and is called now


class RelocationError(VectorCLMError):
    """The records of a moved platform cannot be changed; the message says why."""


def moved(config: PlatformConfig) -> dict[str, str]:
    """The places of this platform that have changed since `up` was run last; empty where none has.

    Another store in the same home is no move: both may be in use.
    """
    known = before(config.home)
    store, home = Store(config.vectorclm_store).uri, str(config.home)
    pairs = {known.get("prefect_page"): config.prefect_page, known.get("mlflow_page"): config.mlflow_page}
    home_before = known.get("home")
    if home_before is None and config.vectorclm_home is None and "://" not in known.get("store", "://"):
        home_before = known["store"]  # earlier versions did not write it down
    if home_before not in (None, home):
        pairs |= {known.get("store"): store, home_before: home}
    return {old: new for old, new in pairs.items() if old and old != new}


def follow(config: PlatformConfig) -> list[str]:
    """Change the records of a platform that was moved or copied, before its servers start; returns a line for each.

    Raises RelocationError where a database cannot be changed: the next `up` does all of it again.
    """
    places = moved(config)
    if places:
        progress = config.home / "platform" / PROGRESS
        for name, change in _steps(config, Names(places)):
            if name not in (done := _done(progress, places)):
                change()
                progress.write_text(json.dumps({"places": places, "done": [*done, name]}), encoding="utf-8")
        progress.unlink(missing_ok=True)
    relocate(f"sqlite:///{config.home / 'mlflow.db'}", config.home)  # also of a store that had no platform yet
    return [f"records follow from {old} to {new}" for old, new in places.items()]


def _steps(config: PlatformConfig, names: "Names") -> Iterator[tuple[str, Callable[[], None]]]:
    """What is changed, each with a name."""
    for name, file, columns in (("mlflow", "mlflow.db", MLFLOW), ("prefect", ".prefect/prefect.db", PREFECT)):
        url = config.database(name, "psycopg2")
        if url is not None or (config.home / file).exists():
            yield name, partial(_change_database, url or f"sqlite:///{config.home / file}", columns, names)
    store = Store(config.vectorclm_store)
    files = str(config.home / ARTIFACTS) if store.is_local else artifacts_destination(store, config.home)
    yield "models", partial(_change_models, Storage(files), names)
    yield "reports", partial(_change_files, store, "reports", (".html",), names)


def _done(progress: Path, places: Places) -> list[str]:
    """The steps that an earlier `up`, which failed, has done: two places may have changed roles."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(progress.read_text(encoding="utf-8"))
        return [str(name) for name in found["done"]] if found["places"] == places else []
    return []


class Names:
    """Replaces places in texts: as they are, as addresses of files, and as JSON writes them."""

    def __init__(self, places: Places) -> None:
        self._new = dict[str, str]()
        for old, new in places.items():
            forms = [(old, new)]
            if old.startswith("/") and new.startswith("/"):
                forms.append((Path(old).as_uri(), Path(new).as_uri()))
            for one, other in forms:
                self._new[one] = other
                if (escaped := json.dumps(one)[1:-1]) != one:
                    self._new[escaped] = json.dumps(other)[1:-1]
        longest = sorted(self._new, key=len, reverse=True)
        # A whole name: not the beginning of a longer one, and not a part of another path.
        self._pattern = re.compile(rf"(?<![\w./-])({'|'.join(map(re.escape, longest))})(?![\w-]|\.\w)")

    @property
    def forms(self) -> list[str]:
        """Every form of the old places."""
        return list(self._new)

    def __call__(self, found: str) -> str:
        """The text with the new places, in one pass, as two places may have changed roles."""
        return self._pattern.sub(lambda match: self._new[match[1]], found)


def _change_database(url: str, tables: Mapping[str, tuple[str, ...]], names: Names) -> None:
    try:
        engine = create_engine(url)
        try:
            _change_columns(engine, tables, names)
        finally:
            engine.dispose()
    except SQLAlchemyError as error:
        first = str(error.__cause__ or error).partition("\n")[0]
        place = url.rpartition("@")[2].removeprefix("sqlite:///")
        raise RelocationError(
            f"the records in {place} still name the place from which they were copied: {first}"
        ) from error


def _change_columns(engine: Engine, tables: Mapping[str, tuple[str, ...]], names: Names) -> None:
    """Change each value once, by its row: by its text, a value might be changed back where two places changed roles."""
    there, is_postgres = inspect(engine), engine.dialect.name == "postgresql"
    contains, row = ("position({} in {}) > 0", "ctid") if is_postgres else ("instr({1}, {0}) > 0", "rowid")
    this = "ctid = cast(:row as tid)" if is_postgres else "rowid = cast(:row as integer)"
    forms = {f"form{number}": form for number, form in enumerate(names.forms)}
    with engine.begin() as connection:
        for table in (name for name in tables if there.has_table(name)):
            for column in there.get_columns(table):
                name, kind = str(column["name"]), str(column["type"]).lower()
                if name not in tables[table]:
                    continue
                is_json = is_postgres and kind.startswith("json")
                value, new = (f"cast({name} as text)", f"cast(:new as {kind})") if is_json else (name, ":new")
                named = " or ".join(contains.format(f":{form}", value) for form in forms)
                asked = f"select cast({row} as text), {value} from {table} where {named}"
                change = f"update {table} set {name} = {new} where {this}"
                for place, found in connection.execute(text(asked), forms).fetchall():
                    if (changed := names(str(found))) != found:
                        connection.execute(text(change), {"new": changed, "row": place})


def _change_models(storage: Storage, names: Names) -> None:
    """Change the logged models: those of a server lie in the folder of their experiment, others beside each other."""
    for folder in storage.list(""):
        _change_files(storage, "models" if folder == "models" else f"{folder}/models", MODEL_FILES, names)


def _change_files(storage: Storage, key: str, ends: tuple[str, ...], names: Names) -> None:
    for place in storage.files(key):
        if place.endswith(ends) and (found := storage.read(place)) is not None:
            changed = names(found.decode(errors="surrogateescape")).encode(errors="surrogateescape")
            if changed != found:
                storage.write(place, changed)
