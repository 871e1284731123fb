"""A store of many artifacts is listed in few operations: one list for each folder, one read for each new manifest."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import s3fs

from tests.conftest import KILLS, S3
from vectorclm.__main__ import main
from vectorclm.store.artifact import StageSpec, Store, build
from vectorclm.store.hash_memory import cache_folder
from vectorclm.store.layout import STAGES
from vectorclm.store.listing import Inventory, take_inventory
from vectorclm.store.storage import TRIES, Storage

MANY = 24  # artifacts


def produce(out: Path) -> dict[str, Any]:
    for name in ("model.safetensors", "config.json", "metrics.jsonl"):
        (out / name).write_text("hello")
    return {}


def filled(store: Store, begin: int = 0, end: int = MANY) -> Store:
    """A store with artifacts of every stage."""
    store.create()
    for number in range(begin, end):
        build(store, StageSpec(STAGES[number % len(STAGES)], 1, {"name": "tiny", "number": number}, {}), produce)
    return store


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The numbers of a store's operations."""
    found: Counter[str] = Counter()

    def count(name: str) -> None:
        real = getattr(Storage, name)

        def operation(self: Storage, *arguments: Any) -> Any:
            found[name] += 1
            return real(self, *arguments)

        monkeypatch.setattr(Storage, name, operation)

    for name in ("read", "files", "list"):
        count(name)
    return found


def finished(found: Inventory) -> int:
    return sum(folder.state == "finished" for folder in found.artifacts)


def test_a_local_store_is_listed_with_one_read_for_each_manifest(
    tmp_path: Path, done: Counter[str], capsys: pytest.CaptureFixture[str]
) -> None:
    store = filled(Store(str(tmp_path / "store")))
    done.clear()
    assert main(["store", "ls", "--store", store.uri]) == 0
    assert done == {"read": MANY, "files": len(STAGES) + 2, "list": 1}
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0].split() == ["stage", "fingerprint", "size", "files", "created", "(UTC)", "used", "by"]
    assert lines[-1].startswith(f"{store.uri}: {MANY} artifacts, ") and len(lines) == MANY + 3


def test_a_remote_store_is_listed_with_reads_of_new_manifests_only(
    tmp_path: Path, done: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store = filled(Store(f"memory://listed-{uuid4()}/store"))

    def listed() -> tuple[Counter[str], Inventory]:
        done.clear()
        return done, take_inventory(store)

    for reads in (MANY, 0):
        asked, found = listed()
        assert asked["read"] == reads and finished(found) == MANY and asked["files"] == len(STAGES) + 2
    filled(store, MANY, MANY + 2)
    store.write(f"{found.artifacts[0].key}/manifest.json", b"{}")  # damaged since
    asked, found = listed()
    assert asked["read"] == 2 + TRIES and finished(found) == MANY + 1 and found.artifacts[0].state == "broken"
    (kept,) = (cache_folder() / "manifests").iterdir()
    kept.write_text(kept.read_text().replace("tiny", "tinY"))  # the cache is damaged
    asked, found = listed()
    assert asked["read"] == MANY + 1 + TRIES and finished(found) == MANY + 1
    assert [folder.artifact.manifest["config"]["name"] for folder in found.artifacts if folder.artifact] == ["tiny"] * (
        MANY + 1
    )


@pytest.mark.skipif(KILLS < 10, reason="starts an S3 server: VECTORCLM_KILLS=10")
def test_a_bucket_is_listed_with_requests_for_new_manifests_only(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**s3.environment(), "XDG_CACHE_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    store = filled(Store(f"s3://{s3.bucket}/listed"))
    asked: Counter[str] = Counter()
    real = s3fs.S3FileSystem._call_s3

    async def call(self: Any, method: str, *arguments: Any, **more: Any) -> Any:
        asked[method] += 1
        return await real(self, method, *arguments, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", call)
    for gets in (MANY, 0):
        asked.clear()
        assert finished(take_inventory(store)) == MANY and asked["get_object"] == gets, asked
        assert asked.total() <= gets + 2 * (len(STAGES) + 4), asked


def test_a_long_table_is_whole_in_a_pipe_and_ends_with_its_reader(tmp_path: Path) -> None:
    """More rows than rich prints fast; names in brackets stay as they are."""
    code = (
        "from vectorclm.command_line import print_table, run, table\n"
        "found = table('name', 'size >', 'a kind')\n"
        "for n in range({rows}): found.add_row(f'n{{n}}', f'{{n:,}}', '\\\\[of {{n}}] ü日本')\n"
        "raise SystemExit(run(lambda: print_table(found)))"
    )
    command = [sys.executable, "-c", code.format(rows=1200)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    few = subprocess.run([sys.executable, "-c", code.format(rows=3)], capture_output=True, text=True, check=True)
    assert lines[0].split() == ["name", "size", "a", "kind"] and set(lines[1].strip()) == {"─"}
    assert lines[-1].split() == ["n1199", "1,199", "[of", "{n}]", "ü日本"] and len(lines) == 1202
    assert lines[2].split() == few.stdout.splitlines()[3].split()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait(60) in (0, 141)


def test_the_listing_as_json_has_every_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(Store(str(tmp_path / "store")), end=9)
    assert main(["store", "ls", "--json", "--store", store.uri]) == 0
    assert len(json.loads(capsys.readouterr().out)["artifacts"]) == 9
