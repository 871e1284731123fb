"""A model or an experiment is removed with what was built from it, and without what others need."""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace
from typing import Any

import pytest

from tests.services.platform import until
from vectorclm.errors import ConfigError, InUseError
from vectorclm.store import gc, lease
from vectorclm.store.artifact import StageSpec, Store, build
from vectorclm.store.durable import TEMPORARY
from vectorclm.store.gc import find_garbage
from vectorclm.store.lease import Lease
from vectorclm.store.listing import take_inventory
from vectorclm.store.removal import claimed, plan_removal, protected, remove

SAMPLE = StageSpec("sample", 1, {"a": 1}, {})
BASE = StageSpec("pretrain", 1, {"a": 1}, {"sample": SAMPLE.fingerprint})
CHAT = StageSpec("finetune", 1, {"a": 1}, {"pretrain": BASE.fingerprint})
OTHER = StageSpec("finetune", 1, {"a": 2}, {"pretrain": BASE.fingerprint})
BEHIND = {"sample": SAMPLE.fingerprint, "pretrain": BASE.fingerprint}
EXPORTS = [
    StageSpec("export", 1, {"name": name}, {**BEHIND, "finetune": chat.fingerprint})
    for name, chat in (("tiny", CHAT), ("own", OTHER))
]


def produce(out: Path) -> dict[str, Any]:
    (out / "x.txt").write_text("hello")
    return {}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two experiments with one base model."""
    made = Store(str(tmp_path / "store"))
    for spec in (SAMPLE, BASE, CHAT, OTHER, *EXPORTS):
        build(made, spec, produce)
    made.write(f"checkpoints/{CHAT.fingerprint}/step-00000012/model.safetensors", b"1234")
    made.write(f"reports/{EXPORTS[0].fingerprint}.html", b"<p>")
    return made


def key(spec: StageSpec) -> str:
    return f"{spec.stage}/{spec.fingerprint}"


def removed(store: Store, name: str) -> dict[str, str]:
    plan = plan_removal(name, store)
    with claimed(store, plan) as stays:
        return dict.fromkeys((folder.key for folder in remove(store, plan, stays)), "") | stays


def left(store: Store) -> set[str]:
    return {folder.key for folder in take_inventory(store).artifacts}


def test_an_experiment_goes_without_what_another_one_uses(store: Store) -> None:
    plan = plan_removal("tiny", store)
    assert [folder.key for folder in plan.kept] == [key(SAMPLE), key(BASE)]
    assert plan.as_json()["keeps"][0]["used_by"] == ["own", "tiny"]
    assert len(left(store)) == 6  # a plan removes nothing
    checkpoint = f"checkpoints/{CHAT.fingerprint}/step-00000012"
    gone = removed(store, "tiny")
    assert list(gone)[-1] == key(EXPORTS[0]) and gone == dict.fromkeys([key(EXPORTS[0]), checkpoint, key(CHAT)], "")
    assert left(store) == {key(SAMPLE), key(BASE), key(OTHER), key(EXPORTS[1])}
    assert store.files("reports") == {} and take_inventory(store).checkpoints == []
    assert set(removed(store, "own").values()) == {""} and left(store) == set()


def test_a_model_goes_with_all_that_was_built_from_it(store: Store) -> None:
    plan = plan_removal(f"pretrain/{BASE.fingerprint[:8]}", store)
    assert set(plan.fingerprints) == {each.fingerprint for each in (BASE, CHAT, OTHER, *EXPORTS)} and not plan.kept
    assert {name for row in plan.as_json()["removes"] for name in row["used_by"]} == {"own", "tiny"}
    assert set(removed(store, key(BASE)).values()) == {""} and left(store) == {key(SAMPLE)}


def test_what_a_process_uses_stays_with_all_that_it_was_built_from(store: Store) -> None:
    with store.lease(f"finetune-{OTHER.fingerprint[:16]}"):
        found = removed(store, key(BASE))
    assert found[key(OTHER)] == "is in use" and found[key(BASE)] == "what was built from it stays"
    assert left(store) == {key(SAMPLE), key(BASE), key(OTHER)}


def test_what_no_export_uses_yet_stays_with_its_inputs(store: Store) -> None:
    store.remove(key(EXPORTS[1]))  # `own` shares the base of `tiny`, and is not exported yet
    rows = {row["key"]: row["why"] for row in plan_removal("tiny", store).as_json()["keeps"]}
    built = f"{key(OTHER)} was built from it"
    assert rows == {key(SAMPLE): built, key(BASE): built, key(OTHER): "no export uses it"}
    assert set(removed(store, "tiny")) == {
        key(EXPORTS[0]),
        key(CHAT),
        f"checkpoints/{CHAT.fingerprint}/step-00000012",
    }
    assert left(store) == {key(SAMPLE), key(BASE), key(OTHER)}


@pytest.mark.parametrize("name", ["tiny", key(BASE)])
def test_what_a_process_builds_from_stays_before_its_result_is_there(store: Store, name: str) -> None:
    for spec in (EXPORTS[1], OTHER):
        store.remove(key(spec))
    found = dict[str, str]()

    def produce_meanwhile(out: Path) -> dict[str, Any]:
        found.update(removed(store, name))
        return produce(out)

    build(store, OTHER, produce_meanwhile)
    assert found[key(BASE)] == "a running process builds from it" and found[key(CHAT)] == ""
    assert {key(SAMPLE), key(BASE), key(OTHER)} <= left(store)
    if name == "tiny":  # its export stays, so that a second call goes on
        assert found[key(EXPORTS[0])] == "the rest of the experiment stays"
        assert removed(store, "tiny") == {key(EXPORTS[0]): ""}


def test_nothing_goes_while_a_process_builds_from_unknown_inputs(store: Store) -> None:
    with store.lease("finetune-0123456789abcdef"), pytest.raises(InUseError, match="perhaps from what would go"):
        removed(store, "tiny")
    with store.lease("measure-0123456789abcdef", []), pytest.raises(InUseError):
        removed(store, "tiny")  # a measurement names its model by the content
    assert len(left(store)) == 6


def test_what_a_run_will_read_stays_between_its_stages(store: Store) -> None:
    """Its next result is not there yet, and no stage of it is at work."""
    for spec in (EXPORTS[1], OTHER):
        store.remove(key(spec))
    with protected(store, [SAMPLE, BASE, OTHER, EXPORTS[1]]):
        found = removed(store, "tiny")
        assert found[key(BASE)] == found[key(SAMPLE)] == "a running process builds from it" and found[key(CHAT)] == ""
    assert {key(SAMPLE), key(BASE)} <= left(store) and store.list("leases") == []
    assert set(removed(store, key(BASE)).values()) == {""}


@contextmanager
def elsewhere(store: Store, spec: StageSpec, clock: float, inputs: list[str] | None) -> Iterator[None]:
    """A process of another machine, whose clock differs, that holds and renews a lease."""
    claim = Lease(store, f"leases/{spec.lease}.json", inputs)
    own = claim._claim

    def changed() -> bytes:
        known = json.loads(own())
        return json.dumps({**known, "host": "elsewhere", "renewed": known["renewed"] + clock}).encode()

    claim._claim = changed  # type: ignore[method-assign]
    claim.acquire()
    try:
        yield
    finally:
        claim.release()


@pytest.mark.parametrize("clock", [-86_400, 86_400])
def test_a_holder_elsewhere_lives_by_its_renewals_whatever_its_clock_says(
    store: Store, clock: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)
    new = StageSpec("finetune", 1, {"a": 3}, {"pretrain": BASE.fingerprint})
    part = f"finetune/{new.fingerprint}/{TEMPORARY}0123456789abcdef"
    store.write(part, b"half")
    for path in Path(store.uri, "finetune", new.fingerprint).iterdir():
        os.utime(path, (1e9, 1e9))
    with elsewhere(store, new, clock, [BASE.fingerprint]):
        assert set(removed(store, key(BASE)).values()) >= {"a running process builds from it"}
        assert find_garbage(store, 0) == [] and store.read(part) == b"half"
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as other:
        with elsewhere(store, CHAT, clock, None):
            run = other.submit(lambda: protected(store, [CHAT]).__enter__())
            until(lambda: "is being removed or repaired: waiting" in caplog.text, "the run waits", 60)
            assert not run.done()
        run.result(60)


@pytest.mark.parametrize("clock", [-86_400, 86_400])
def test_a_dead_holder_elsewhere_protects_nothing_whatever_its_clock_said(
    store: Store, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.3)
    dead = {"host": "elsewhere", "pid": 1, "token": "x", "renewed": time.time() + clock}
    new = StageSpec("finetune", 1, {"a": 3}, {"pretrain": BASE.fingerprint})
    store.write(f"leases/{new.lease}.json", json.dumps({**dead, "inputs": [BASE.fingerprint]}).encode())
    store.write(f"leases/{CHAT.lease}.json", json.dumps(dead).encode())
    with protected(store, [CHAT]):
        pass
    assert set(removed(store, "tiny").values()) == {""}


@pytest.mark.parametrize("clock", [-8 * 86_400, 8 * 86_400])
def test_a_young_file_is_no_garbage_by_the_clock_of_the_store(
    store: Store, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    young, old = (StageSpec("sample", 1, {"a": a}, {}) for a in (4, 5))
    for spec in (young, old):
        store.write(f"sample/{spec.fingerprint}/x.txt", b"half")
    month = time.time() - 30 * 86_400
    os.utime(Path(store.uri, "sample", old.fingerprint, "x.txt"), (month, month))
    before, now = [name for name in store.files("") if "/" not in name], time.time
    monkeypatch.setattr(gc, "time", SimpleNamespace(time=lambda: now() + clock))  # this machine's clock
    assert [item.what for item in find_garbage(store, 86_400)] == [f"sample/{old.fingerprint}"]
    assert [name for name in store.files("") if "/" not in name] == before


def test_a_run_finds_a_whole_artifact_or_none_where_a_removal_has_begun(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_removal(key(CHAT), store)

    def run() -> bool:
        with protected(store, [SAMPLE, BASE, CHAT]):
            return store.find(CHAT.stage, CHAT.fingerprint) is None

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as other:
        with claimed(store, plan) as stays:
            gone = other.submit(run)
            until(lambda: "is being removed or repaired: waiting" in caplog.text, "the run waits", 60)
            assert len(list(remove(store, plan, stays))) == 3
            assert not gone.done()
        assert gone.result(60)


def test_the_lease_of_a_killed_run_protects_nothing_and_goes_with_the_next_run(store: Store) -> None:
    code = (
        "import sys; from vectorclm.store.artifact import Store, StageSpec; "
        "from vectorclm.store.removal import protected\n"
        "with protected(Store(sys.argv[1]), [StageSpec('sample', 1, {'a': 1}, {})]): "
        "print('reads', flush=True); input()"
    )
    with Popen([sys.executable, "-c", code, store.uri], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "reads\n"
        assert removed(store, key(SAMPLE))[key(SAMPLE)] == "a running process builds from it"
        process.kill()
    (dead,) = store.list("leases")
    with protected(store, [BASE]):
        assert dead not in store.list("leases")
    assert set(removed(store, key(SAMPLE)).values()) == {""}


@pytest.mark.parametrize("name", ["tiny", key(BASE)])
def test_a_removal_that_was_killed_goes_on(store: Store, name: str) -> None:
    store.remove(key(EXPORTS[1]))
    store.remove(key(OTHER))
    while True:  # a process that is killed after each folder
        plan = plan_removal(name, store)
        with claimed(store, plan) as stays:
            next(remove(store, plan, stays))
        if len(plan.folders) == 1:
            break
    assert left(store) <= {key(SAMPLE)} and not take_inventory(store).checkpoints


def test_a_link_and_a_model_elsewhere_are_left_alone(store: Store, tmp_path: Path) -> None:
    folder = Path(store.root, "finetune", CHAT.fingerprint)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert removed(store, key(CHAT))[key(CHAT)] == "is a link: remove it by hand"
    assert (tmp_path / "elsewhere" / "x.txt").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError, match="only an artifact of a store can be removed"):
        plan_removal(str(tmp_path / "mine"), store)
