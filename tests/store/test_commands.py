"""What a store has is listed, what differs is told, and only what nothing needs is removed."""

import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import files_below
from vectorclm.__main__ import main
from vectorclm.errors import DiskFullError
from vectorclm.store import gc, lease
from vectorclm.store.artifact import MANIFEST, StageSpec, Store, build
from vectorclm.store.gc import find_garbage, remove_garbage, seconds
from vectorclm.store.listing import take_inventory

SAMPLE = StageSpec("sample", 1, {"a": 1}, {})
TRAINED = StageSpec("pretrain", 1, {"a": 1}, {"sample": SAMPLE.fingerprint})
EXPORT = StageSpec("export", 1, {"name": "tiny"}, {"pretrain": TRAINED.fingerprint})
OLD = time.time() - 30 * 86400


def produce(out: Path) -> dict[str, Any]:
    (out / "part").mkdir()
    (out / "part" / "x.txt").write_text("hello")
    return {}


def age(folder: Path) -> None:
    """Have all below a folder be written a month ago."""
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (OLD, OLD))


def asked(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[Any]]:
    """The exit code and the objects that a command of the store prints."""
    capsys.readouterr()
    code = main(["store", *options, "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with a finished export and what it was made from."""
    made = Store(str(tmp_path / "store"))
    for plan in (SAMPLE, TRAINED, EXPORT):
        build(made, plan, produce)
    return made


def test_the_listing_tells_sizes_users_checkpoints_and_leases(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, unfinished = StageSpec("sample", 1, {"a": 2}, {}), StageSpec("finetune", 1, {}, {})
    build(store, other, produce)
    store.write(f"checkpoints/{unfinished.fingerprint}/step-00000012/model.safetensors", b"1234")
    with store.lease("sample-0123456789abcdef"):
        code, (found,) = asked(capsys, "ls", "--store", store.uri)
    rows = {row["fingerprint"]: row for row in found["artifacts"]}
    assert code == 0 and len(rows) == 4
    assert all(rows[plan.fingerprint]["used_by"] == ["tiny"] for plan in (SAMPLE, TRAINED, EXPORT))
    assert rows[other.fingerprint]["used_by"] == [] and rows[other.fingerprint]["state"] == "finished"
    manifest = store.files(f"sample/{SAMPLE.fingerprint}/{MANIFEST}").popitem()[1]
    assert rows[SAMPLE.fingerprint]["bytes"] == 5 + manifest.bytes and rows[SAMPLE.fingerprint]["files"] == 2
    (checkpoint,) = found["checkpoints"]
    assert (checkpoint["step"], checkpoint["bytes"], checkpoint["state"]) == (12, 4, "unfinished")
    (lease,) = found["leases"]
    assert lease["pid"] == os.getpid() and lease["alive"]
    assert main(["store", "ls", "--store", store.uri]) == 0
    lines = capsys.readouterr().out.splitlines()
    (heading,) = (line for line in lines if "fingerprint" in line)
    (export,) = (line for line in lines if EXPORT.fingerprint[:12] in line)
    for column in ("stage", "fingerprint", "created", "used by"):  # one below the other
        assert not export[heading.index(column) :].startswith(" "), column
    assert export.split()[-1] == "tiny" and max(map(len, lines)) <= 240
    assert re.search(r" \d{4}-\d\d-\d\d \d\d:\d\d  ", export)  # short enough for a terminal of 80 columns


def test_verify_names_every_difference_and_ends_in_1(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = asked(capsys, "verify", "--store", store.uri)
    assert code == 0 and len(rows) == 3 and not any(row["differences"] for row in rows)
    folder = Path(store.uri) / "sample" / SAMPLE.fingerprint
    (folder / "part" / "x.txt").write_text("hullo")
    (folder / "foreign").write_text("")
    (Path(store.uri) / "pretrain" / TRAINED.fingerprint / "part" / "x.txt").unlink()
    manifest = Path(store.uri) / "export" / EXPORT.fingerprint / MANIFEST
    manifest.write_text(manifest.read_text().replace('"tiny"', '"tinY"'))
    code, rows = asked(capsys, "verify", "--store", store.uri)
    told = {row["key"].split("/")[0]: row["differences"] for row in rows}
    assert code == 1 and len(told["sample"]) == 2
    assert "SHA-256" in told["sample"][0] and "foreign is not in" in told["sample"][1]
    assert len(told["pretrain"]) == 1 and "is missing" in told["pretrain"][0]
    assert len(told["export"]) == 1
    code, rows = asked(capsys, "verify", f"{store.uri}/pretrain/{TRAINED.fingerprint[:8]}", "--store", store.uri)
    assert code == 1 and len(rows) == 1
    assert main(["store", "verify", "shards", "--store", store.uri]) == 2
    assert "has no finished shards" in capsys.readouterr().err


def test_verify_ends_in_0_when_it_has_discarded_all_that_differs(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in 1 while one of them is in use by another process."""
    for plan in (SAMPLE, EXPORT):
        (Path(store.uri) / plan.stage / plan.fingerprint / "part" / "x.txt").write_text("hullo")
    with store.lease(EXPORT.lease):
        code, rows = asked(capsys, "verify", "--discard", "--store", store.uri)
    gone = {row["key"].split("/")[0]: row["discarded"] for row in rows}
    assert code == 1 and gone == {"sample": True, "pretrain": False, "export": False}
    assert main(["store", "verify", "--discard", "--store", store.uri]) == 0
    out = capsys.readouterr().out
    assert out.endswith("2 verified, 1 differ, 1 of them discarded\n") and f"!! export/{EXPORT.fingerprint}" in out
    code, rows = asked(capsys, "verify", "--discard", "--store", store.uri)
    assert code == 0 and [row["key"] for row in rows] == [f"pretrain/{TRAINED.fingerprint}"]


def leave_behind(store: Store) -> set[str]:
    """What processes that were killed leave, a month old; and what has to stay. Returns the keys of the former."""
    root = Path(store.uri)
    half, training = StageSpec("sample", 1, {"a": 3}, {}), StageSpec("finetune", 1, {"a": 3}, {})
    for key in (
        f"sample/{half.fingerprint}/part/x.txt",
        f"sample/{SAMPLE.fingerprint}/part/.x.txt.0a1b2c3d",
        f"checkpoints/{TRAINED.fingerprint}/step-00000010/model.safetensors",
        f"checkpoints/{TRAINED.fingerprint}/again/step-00000010/model.safetensors",
        f"checkpoints/{training.fingerprint}/step-00000020/model.safetensors",
        f"work/sample-{half.fingerprint[:16]}/out/x.txt",
        ".probe-01234567",
        "notes/read me.txt",
        "mlartifacts/1/.hidden",
    ):
        store.write(key, b"left")
    step = root.parent / "step"
    step.mkdir()
    (step / "model.safetensors").write_text("whole")
    store.publish_directory(f"checkpoints/{training.fingerprint}/step-00000010", step, {"step": 10})
    dead = {"host": "elsewhere", "pid": 1, "token": "x", "renewed": OLD}
    store.write(f"leases/sample-{half.fingerprint[:16]}.json", json.dumps(dead).encode())
    age(root)
    return {
        f"sample/{half.fingerprint}",
        f"sample/{SAMPLE.fingerprint}/part/.x.txt.0a1b2c3d",
        f"checkpoints/{TRAINED.fingerprint}/step-00000010",
        f"checkpoints/{TRAINED.fingerprint}/again/step-00000010",
        f"checkpoints/{training.fingerprint}/step-00000020",
        f"leases/sample-{half.fingerprint[:16]}.json",
        str(root / f"work/sample-{half.fingerprint[:16]}"),
        ".probe-01234567",
    }


def test_gc_tells_what_can_go_and_removes_it_only_when_told_to(
    store: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.3)  # for one is of another machine
    expected = leave_behind(store)
    before = set(store.files(""))
    code, rows = asked(capsys, "gc", "--store", store.uri)
    assert code == 0 and {row["what"] for row in rows} == expected and not any(row["removed"] for row in rows)
    assert set(store.files("")) == before
    assert asked(capsys, "gc", "--older-than", "9w", "--store", store.uri)[1] == []
    rows = asked(capsys, "gc", "--delete", "--store", store.uri)[1]
    assert {row["what"] for row in rows} == expected and all(row["removed"] for row in rows)
    assert asked(capsys, "gc", "--older-than", "0s", "--store", store.uri)[1] == []
    assert asked(capsys, "verify", "--store", store.uri)[0] == 0
    left = set(store.files(""))
    assert {"notes/read me.txt", "mlartifacts/1/.hidden"} <= left and len(take_inventory(store).checkpoints) == 1


def test_gc_frees_a_full_disk_on_which_no_lease_can_be_written(
    store: Store,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Everything but what a live process holds goes, though no byte can be written."""
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.3)  # for one is of another machine
    expected, held = leave_behind(store), StageSpec("tokenizer", 1, {"a": 8}, {})
    store.write(f"tokenizer/{held.fingerprint}/x.txt", b"half")
    age(Path(store.uri) / "tokenizer" / held.fingerprint)
    with store.lease(held.lease):
        with files_below(0):
            with pytest.raises(DiskFullError, match=r"no space left while writing .*store gc --older-than 1h --delete"):
                build(store, StageSpec("sample", 1, {"a": 9}, {}), produce)
            code, rows = asked(capsys, "gc", "--delete", "--store", store.uri)
        assert code == 0 and {row["what"] for row in rows if row["removed"]} == expected
        assert find_garbage(store, 0) == [] and store.read(f"tokenizer/{held.fingerprint}/x.txt") == b"half"
    assert any("removed under the lock of the store" in line for line in caplog.messages)
    assert asked(capsys, "verify", "--store", store.uri)[0] == 0


def test_gc_names_what_its_age_leaves(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    half = Path(store.uri) / "sample" / StageSpec("sample", 1, {"a": 3}, {}).fingerprint
    half.mkdir()
    (half / "x.txt").write_text("half")
    hour = time.time() - 3600
    os.utime(half / "x.txt", (hour, hour))
    assert main(["store", "gc", "--store", store.uri]) == 0
    told = capsys.readouterr().err
    assert "0 of them, 0 B" in told and "1 younger ones, 4 B, stay: --older-than 0s includes them" in told
    assert main(["store", "gc", "--older-than", "0s", "--delete", "--store", store.uri]) == 0
    assert not half.exists() and "younger" not in capsys.readouterr().err


def test_gc_spares_what_is_young_or_held_or_written_to_meanwhile(store: Store) -> None:
    young, held, resumed = (StageSpec("sample", 1, {"a": a}, {}) for a in (4, 5, 6))
    for plan in (young, held, resumed):
        store.write(f"sample/{plan.fingerprint}/x.txt", b"half")
        age(Path(store.uri) / "sample" / plan.fingerprint) if plan is not young else None
    with store.lease(f"sample-{held.fingerprint[:16]}"):
        (item,) = find_garbage(store, 86400)
    assert item.what == f"sample/{resumed.fingerprint}"
    with store.lease(f"sample-{resumed.fingerprint[:16]}"):
        assert not remove_garbage(store, item)
    build(store, resumed, produce)  # somebody goes on with it after it was found
    assert not remove_garbage(store, item)
    store.find("sample", resumed.fingerprint).verify("part/*")  # type: ignore[union-attr]


def test_gc_of_a_remote_store_finds_this_machines_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gc, "YOUNG_SECONDS", 0)
    store = Store(f"memory://{tmp_path.name}")
    build(store, SAMPLE, produce)

    def killed(out: Path) -> dict[str, Any]:
        produce(out)
        raise SystemExit

    other = StageSpec("sample", 1, {"a": 7}, {})
    with pytest.raises(SystemExit):
        build(store, other, killed)
    store.write(f"sample/{other.fingerprint}/part/x.txt", b"half")
    found = find_garbage(store, 0)
    work = store.work_folder(other, None)
    assert [item.what for item in found] == [f"sample/{other.fingerprint}", str(work)]
    assert all(remove_garbage(store, item) for item in found)
    assert find_garbage(store, 0) == [] and not work.exists()
    assert [folder.fingerprint for folder in take_inventory(store).artifacts] == [SAMPLE.fingerprint]


def foreign(store: Store) -> set[Path]:
    """Files of others in the store's folder and below its own folders, and links that lead out of it, or back."""
    root, hash_, outside = Path(store.uri), "f" * 64, Path(store.uri).parent / "outside"
    places = (
        (".env", ".git/config", ".git/.hidden", ".probe-of-mine", ".vectorclm-tmp-of-mine", "notes/.read.0a1b2c3d"),
        (f"project/{hash_}/x.txt", "project/.env", f"project/{hash_}/.x.txt.0a1b2c3d"),
        ("sample/.env", "sample/notes/.hidden", f"sample/{hash_}/.git/config", f"sample/{hash_}/x.txt"),
        ("leases/contract.pdf", "leases/.env", "checkpoints/.env", "reports/.env", "work/mine/x.txt", "work/.env"),
        (f"checkpoints/{hash_}/weights/x.bin", "mlartifacts/.env", f"platform/{hash_}/x.txt"),
        (f"sample/{SAMPLE.fingerprint}/.env", f"pretrain/{'e' * 63}/x.txt"),
    )
    files = {root / name for group in places for name in group}
    files |= {
        outside / name for name in (f"{hash_}/x.txt", "part/x.txt", ".vectorclm-tmp-0123456789abcdef", ".x.0a1b2c3d")
    }
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("of others")
    links = {
        "linked": outside,
        "loop": root,
        f"sample/{'a' * 64}": outside,
        f"sample/{'b' * 64}": root,
        "sample/loop": root / "sample",
        "sample/up": root.parent,
        f"sample/{SAMPLE.fingerprint}/part/out": outside,
        "leases/out": outside,
        "shards": outside,
        "tokenizer": root.parent,
        "work/sample-0123456789abcdef": outside,
        f"checkpoints/{'c' * 64}": outside,
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    return files | {root / name for name in links}


def test_gc_leaves_foreign_files_and_follows_no_link(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    left = Path(store.uri, f"sample/{SAMPLE.fingerprint}/part/.vectorclm-tmp-0123456789abcdef")
    lone = Path(store.uri, "export/.vectorclm-tmp-0123456789abcdef")  # a folder of a publication that was cut off
    theirs = foreign(store)
    left.write_text("left")
    lone.mkdir()
    (lone / "x.txt").write_text("left")
    for path in sorted((*theirs, left, lone / "x.txt", lone), key=lambda path: len(path.parts), reverse=True):
        os.utime(path, (OLD, OLD), follow_symlinks=False)
    code, rows = asked(capsys, "gc", "--older-than", "0s", "--delete", "--store", store.uri)
    assert code == 0 and {row["what"] for row in rows if row["removed"]} == {
        left.relative_to(store.uri).as_posix(),
        lone.relative_to(store.uri).as_posix(),
    }
    assert not left.exists() and not lone.exists() and all(path.is_symlink() or path.exists() for path in theirs)
    assert all(path.read_text() == "of others" for path in theirs if path.is_file())
    code, (found,) = asked(capsys, "ls", "--store", store.uri)
    assert code == 0 and {row["fingerprint"] for row in found["artifacts"] if row["state"] == "finished"} == {
        plan.fingerprint for plan in (SAMPLE, TRAINED, EXPORT)
    }
    told = {row["key"]: row["differences"] for row in asked(capsys, "verify", "--store", store.uri)[1]}
    assert [key for key, differences in told.items() if differences] == [f"sample/{SAMPLE.fingerprint}"]  # the link


def test_an_artifact_behind_a_link_is_listed_and_left(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(store.uri) / "sample" / SAMPLE.fingerprint
    elsewhere = Path(store.uri).parent / "large disk"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert build(store, SAMPLE, produce)[1] and asked(capsys, "verify", "sample", "--store", store.uri)[0] == 0
    (elsewhere / MANIFEST).rename(elsewhere / "former")
    age(elsewhere)
    assert asked(capsys, "gc", "--older-than", "0s", "--delete", "--store", store.uri) == (0, [])
    assert (elsewhere / "part" / "x.txt").read_text() == "hello"


def test_gc_beside_writers_disturbs_none_and_stumbles_over_nothing(store: Store) -> None:
    ended, problems = threading.Event(), list[BaseException]()

    def collect() -> None:
        try:
            while not ended.is_set():
                for item in find_garbage(store, 0):
                    remove_garbage(store, item)
        except BaseException as error:
            problems.append(error)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for number in range(10):
            store.check_writable()
            assert not build(store, StageSpec("sample", 1, {"beside": number}, {}), produce)[1]
            store.remove(f"sample/{StageSpec('sample', 1, {'beside': number}, {}).fingerprint}")
    finally:
        ended.set()
        collector.join()
    assert not problems


def test_an_age_has_a_unit(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert [seconds(text) for text in ("90s", "2m", "1h", "7d", "1w")] == [90, 120, 3600, 604800, 604800]
    assert main(["store", "gc", "--older-than", "7", "--store", store.uri]) == 2
    assert "--older-than 7: give a number and" in capsys.readouterr().err


def test_a_store_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("ls", "verify", "gc"):
        assert main(["store", action, "--store", str(tmp_path / "none")]) == 2
        assert capsys.readouterr().err.startswith(f"error: there is no store at {tmp_path / 'none'}: name one")
    assert not (tmp_path / "none").exists()
