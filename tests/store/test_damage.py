"""A file of an artifact that is empty, short, missing or has a wrong bit is made again or named, and never used."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flows.cli import main as vectorclm
from tests.test_curriculum import mini
from vectorclm.__main__ import main
from vectorclm.errors import CorruptArtifactError, ReproducibilityError
from vectorclm.lineage.pinning import pin
from vectorclm.runtime.devices import Runtime
from vectorclm.stages import TABLE, plans, rebuild_stage, run_stage
from vectorclm.store.artifact import MANIFEST, StageSpec, Store, build
from vectorclm.store.hash_memory import HashMemory, state_of
from vectorclm.store.layout import STAGES
from vectorclm.store.manifest import SEAL, sealed
from vectorclm.store.storage import sha256_of
from vectorclm.training.checkpoint import Checkpoints, Snapshot

PLAN = StageSpec("sample", 1, {"a": 1}, {})
RUNTIME = Runtime(threads=1)
READER = {
    name: row.name for row in reversed(TABLE) for name in row.inputs
}  # the first stage that reads a stage's files


def produce(out: Path) -> dict[str, Any]:
    (out / "part").mkdir()
    (out / "part" / "x.txt").write_text("hello")
    return {"files": 1}


def turn_a_bit(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: os.truncate(path, 0),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "deleted": Path.unlink,
}


@contextmanager
def damaged(path: Path, damage: Callable[[Path], object]) -> Iterator[None]:
    """Damage a file while the block runs; then it is as it was."""
    data = path.read_bytes()
    damage(path)
    yield
    path.write_bytes(data)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A finished experiment with small budgets, and each stage's folder."""
    folder = tmp_path_factory.mktemp("damage")
    path, store = folder / "mini.json", Store(str(folder / "store"))
    path.write_text(mini().model_dump_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        experiment, _ = pin(mini(), path, None, resolve=True)
        for stage in STAGES:
            run_stage(stage, experiment, store, RUNTIME, None)
        folders = {name: Path(store.root, name, plan.fingerprint) for name, plan in plans(experiment).items()}
        yield SimpleNamespace(path=path, store=store, experiment=experiment, folders=folders)


def files_of(folder: Path) -> list[Path]:
    names = json.loads((folder / MANIFEST).read_text())["files"]
    return [folder / name for name in names if (folder / name).stat().st_size]


@pytest.mark.parametrize("damage", [*DAMAGES.values(), turn_a_bit], ids=[*DAMAGES, "bit"])
@pytest.mark.parametrize("name", ["part/x.txt", MANIFEST])
def test_a_damaged_file_is_made_again_with_one_warning(
    tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], object]
) -> None:
    store = Store(str(tmp_path / "store"))
    artifact, _ = build(store, PLAN, produce)
    folder = Path(artifact.uri)
    damage(folder / name)
    if damage is turn_a_bit and name != MANIFEST:
        with pytest.raises(CorruptArtifactError, match=r"x\.txt: SHA-256 .*, then run its stage again"):
            artifact.local()
    again, reused = build(store, PLAN, produce)
    assert not reused and (folder / "part" / "x.txt").read_text() == "hello" and again.local() == folder
    warned = [line for line in caplog.messages if "sample is built again now" in line]
    lost = damage is DAMAGES["deleted"] and name == MANIFEST  # then it was never finished
    assert len(warned) == (0 if lost else 1) and all(name in line for line in warned)
    assert build(store, PLAN, produce)[1] and len(caplog.messages) == len(warned)


def test_a_remote_artifact_is_looked_at_as_well(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(f"memory://{tmp_path.name}")
    artifact, _ = build(store, PLAN, produce)
    key = artifact.key("part/x.txt")
    for data in (b"", b"he"):
        store.write(key, data)
        with pytest.raises(CorruptArtifactError, match=r"x\.txt has . bytes, the manifest says 5: run its stage again"):
            store.find(PLAN.stage, PLAN.fingerprint)
        assert not build(store, PLAN, produce)[1]
        key = store.find(PLAN.stage, PLAN.fingerprint).key("part/x.txt")  # type: ignore[union-attr]
    store.delete(key)
    again, reused = build(store, PLAN, produce)
    assert not reused and len(caplog.messages) == 3
    store.write(again.key("part/x.txt"), b"hullo")
    with pytest.raises(CorruptArtifactError, match=r"x\.txt: SHA-256"):
        store.find(PLAN.stage, PLAN.fingerprint).local()  # type: ignore[union-attr]
    made, reused = build(store, PLAN, produce)
    assert not reused and (made.local() / "part" / "x.txt").read_text() == "hello"


def test_what_verify_gives_up_is_made_again_without_any_memory(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path / "store"))
    artifact, _ = build(store, PLAN, produce)
    turn_a_bit(Path(artifact.uri) / "part" / "x.txt")
    cache.write_text("not a folder: nothing can be remembered")
    with pytest.raises(CorruptArtifactError) as caught:
        artifact.local()
    assert build(store, PLAN, produce)[1]  # names and sizes are right
    command = str(caught.value).split("`")[1].split()
    assert main(command[1:]) == 0 and "1 verified, 1 differ, 1 of them discarded\n" in capsys.readouterr().out
    assert not build(store, PLAN, produce)[1] and main(["store", "verify", "--store", store.uri]) == 0


def test_a_file_is_hashed_once_for_each_change(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(2**22))
    os.utime(file, ns=(0, 0))

    def read(name: str = "weights") -> int:
        """The bytes that this process reads to know the hash."""
        before = Path("/proc/self/io").read_text().split()[1]
        memory = HashMemory("file:weights")
        assert len(memory.hash_file(name, file)) == 64
        memory.save()
        return int(Path("/proc/self/io").read_text().split()[1]) - int(before)

    while read() > 2**20:  # as soon as it can be told from a change in the same moment
        pass
    before = state_of(file.stat())
    turn_a_bit(file)
    os.utime(file, ns=(0, 0))  # as before: size, time, inode
    assert state_of(file.stat()) != before and read() > 2**20


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "metrics.jsonl", MANIFEST])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, cache: Path, name: str) -> None:
    for number, damage in enumerate([*DAMAGES.values(), turn_a_bit]):
        store = Store(str(tmp_path / str(number)))
        with Checkpoints(store, PLAN, tmp_path / "work", "data") as checkpoints:
            for step in (1, 2):
                weights = {"w": torch.ones(300) * step}
                checkpoints.save(Snapshot(step, weights, {"0.0.m": weights["w"]}, f"{step}\n", "order"))
        newest = sorted(Path(store.root, checkpoints.root).iterdir())[-1]
        damage(newest / name)
        found = Checkpoints(store, PLAN, tmp_path / "work", "data").latest("order")
        assert found is not None and found.step == 1 and not newest.exists()


@pytest.mark.parametrize("stage", STAGES)
def test_every_file_of_every_stage_is_looked_at_before_reused(made: SimpleNamespace, stage: str) -> None:
    plan, files = plans(made.experiment)[stage], files_of(made.folders[stage])
    for path in files:
        for damage in DAMAGES.values():
            with damaged(path, damage):
                assert made.store.find_whole(plan) is None
                with pytest.raises(CorruptArtifactError, match=f"{path.name} (is missing|has .*): run its stage again"):
                    made.store.find(plan.stage, plan.fingerprint)
        with damaged(path, turn_a_bit), pytest.raises(CorruptArtifactError, match=f"{path.name}: SHA-256 is"):
            made.store.look_up(plan.stage, plan.fingerprint).local()
    assert files and made.store.find(plan.stage, plan.fingerprint) is not None


def test_a_wrong_bit_stops_the_stage_that_reads_it_and_is_mended_by_its_own(
    made: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(str(tmp_path / "store"))
    shutil.copytree(made.store.root, store.root)
    for stage, reader in READER.items():
        folder = Path(store.root, stage, made.folders[stage].name)
        shutil.rmtree(Path(store.root, reader, made.folders[reader].name))
        largest = max(files_of(folder), key=lambda path: (path.name == "scores.json", path.stat().st_size))
        right = largest.read_bytes()
        turn_a_bit(largest)
        with pytest.raises(CorruptArtifactError, match=largest.name):
            run_stage(reader, made.experiment, store, RUNTIME, None)
        caplog.clear()
        assert not run_stage(stage, made.experiment, store, RUNTIME, None)[1]
        assert largest.read_bytes() == right or largest.name in ("metrics.jsonl", "scores.json")
        assert len([line for line in caplog.messages if f"{stage} is built again now" in line]) == 1
        run_stage(reader, made.experiment, store, RUNTIME, None)


def test_a_rebuild_names_the_damaged_file_and_not_the_machine(
    made: SimpleNamespace, tmp_path: Path, cache: Path
) -> None:
    """A wrong bit in the artifact itself, and one in an artifact before it where the result differs, too."""
    store = Store(str(tmp_path / "store"))
    shutil.copytree(made.store.root, store.root)
    folders = {name: Path(store.root, name, folder.name) for name, folder in made.folders.items()}
    file = folders["tokenizer"] / "tokenizer.json"
    with damaged(file, turn_a_bit):
        command = rf"tokenizer\.json: SHA-256 .* `vectorclm store verify --discard tokenizer/.* --store {store.uri}`"
        with pytest.raises(CorruptArtifactError, match=command):
            rebuild_stage("tokenizer", made.experiment, store, RUNTIME, None)
    assert rebuild_stage("tokenizer", made.experiment, store, RUNTIME, None)[1]
    file.write_text(file.read_text() + " ")  # an artifact that is whole, and another than this machine builds
    manifest = json.loads((file.parent / MANIFEST).read_text())
    del manifest[SEAL]
    manifest["files"][file.name] |= {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    (file.parent / MANIFEST).write_bytes(sealed(manifest))
    with pytest.raises(ReproducibilityError, match=r"differs from .* in tokenizer\.json"):
        rebuild_stage("tokenizer", made.experiment, store, RUNTIME, None)
    unread = next(path for path in files_of(folders["sample"]) if path.name.startswith("validation-"))
    with damaged(unread, turn_a_bit), pytest.raises(CorruptArtifactError, match=unread.name):
        rebuild_stage("tokenizer", made.experiment, store, RUNTIME, None)


def test_a_model_with_a_wrong_bit_is_used_by_no_command(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VECTORCLM_API_KEY", "of-the-tests-0123456789")
    text, runtime = tmp_path / "text.txt", tmp_path / "runtime.json"
    text.write_text("The otter swims by the lake.")
    runtime.write_text('{"threads": 1}')
    chat, base = made.folders["finetune"], made.folders["pretrain"]
    (tmp_path / "link").symlink_to(chat)
    place = ["--store", made.store.uri]
    suite = ["--suite", str(made.path), "--items", "2", "--documents", "2", "--runtime", str(runtime), *place]
    core = [
        ["chat", str(chat)],
        ["chat", str(tmp_path / "link")],
        ["chat", f"{made.folders['export']}/chat"],
        ["serve", str(chat)],
        ["evaluate", str(chat), "--text", str(text)],
        ["evaluate", str(chat), *suite],
        ["export", str(chat), "--format", "gguf"],
        ["compare", str(base), str(chat), *place],
    ]
    assert main(["evaluate", str(chat), *suite]) == 0  # what was measured before is not told for the damaged one, too
    weights = [made.folders["finetune"] / "model.safetensors", made.folders["export"] / "chat" / "model.safetensors"]
    before = [path.read_bytes() for path in weights]
    for path in weights:
        turn_a_bit(path)
    capsys.readouterr()
    for command in core:
        for run in (main, vectorclm) if command[0] in ("chat", "evaluate") else (main,):
            code = run(command)
            said = capsys.readouterr()
            assert code == 2 and not said.out, (command, said)
            (line,) = said.err.strip().splitlines()
            assert line.startswith("error: ") and "model.safetensors: SHA-256 is" in line and "run its stage" in line
    assert not list(tmp_path.glob("*.gguf"))
    for path, data in zip(weights, before, strict=True):
        path.write_bytes(data)
    assert main(["evaluate", str(chat), "--text", str(text)]) == 0
