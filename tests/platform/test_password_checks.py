"""Passwords of MLflow's users: right ones are hashed once, changed and deleted ones are refused at once everywhere."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from pydantic import SecretStr
from werkzeug.security import check_password_hash, generate_password_hash

from flows.net import free_port
from flows.platform import password_checks
from flows.platform.config import PlatformConfig
from flows.platform.password_checks import RememberedPasswords

ADMIN = httpx.BasicAuth("admin", "of-the-admin-91")
USERS = "/api/2.0/mlflow/users"
SEARCH = "/api/2.0/mlflow/experiments/search"
EACH_WORKER = 12  # requests, so that each worker gets some


class Counted:
    """A check of passwords that counts its calls."""

    def __init__(self, check: Callable[[str, str], bool]) -> None:
        self.check, self.calls = check, 0

    def __call__(self, stored: str, password: str) -> bool:
        self.calls += 1
        return self.check(stored, password)


def test_a_right_password_is_hashed_once_and_a_wrong_one_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = Counted(check_password_hash)
    check, stored, changed = RememberedPasswords(hashed), *map(generate_password_hash, ("right", "another"))
    assert [check(stored, "right") for _ in range(3)] == [True] * 3 and hashed.calls == 1
    assert [check(stored, "wrong") for _ in range(3)] == [False] * 3 and hashed.calls == 4
    assert not check(changed, "right") and check(changed, "another") and hashed.calls == 6
    monkeypatch.setattr(password_checks, "REMEMBERED_SECONDS", 0)
    assert check(stored, "right") and hashed.calls == 6  # remembered before
    assert RememberedPasswords(hashed)(stored, "right") and hashed.calls == 7


def test_what_is_remembered_is_bounded_and_forgotten_and_holds_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = Counted(lambda stored, password: True)
    check, now = RememberedPasswords(hashed), 0.0
    monkeypatch.setattr(password_checks, "MOST", 3)
    monkeypatch.setattr(password_checks.time, "monotonic", lambda: now)
    for name in "abcde":
        check("stored", f"secret {name}")
    assert len(check._until) <= 3 and not any(b"secret" in known for known in check._until)
    assert check("stored", "secret e") and hashed.calls == 5
    now = password_checks.REMEMBERED_SECONDS + 1.0
    assert check("stored", "secret e") and hashed.calls == 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """MLflow's server with users, as `up` starts it, with two workers."""
    config = PlatformConfig(
        vectorclm_store=str(tmp_path_factory.mktemp("users") / "store"),
        mlflow_port=free_port(),
        mlflow_admin_password=SecretStr("of-the-admin-91"),
        mlflow_secret_key=SecretStr("of-the-cookies"),
    )
    Path(config.vectorclm_store).mkdir()
    service = config.servers()[1]
    try:
        service.start()
        service.wait()
        with httpx.Client(base_url=config.mlflow_url, timeout=60) as client:
            client.headers["vectorclm-pid"] = str(service.process().pid)  # type: ignore[union-attr]
            yield client
    finally:
        service.stop()


def asked(server: httpx.Client, user: str, password: str) -> set[int]:
    """The answers to many requests of a user at once, each by a connection of its own, so that each worker is asked."""

    def ask(_: int) -> int:
        auth = httpx.BasicAuth(user, password)
        return httpx.post(f"{server.base_url}{SEARCH}", json={"max_results": 1}, auth=auth, timeout=60).status_code

    with ThreadPoolExecutor(4) as threads:
        return set(threads.map(ask, range(EACH_WORKER)))


def test_a_changed_password_and_a_deleted_user_are_refused_at_once_by_each_worker(server: httpx.Client) -> None:
    made = server.post(f"{USERS}/create", json={"username": "eve", "password": "the first one 1"}, auth=ADMIN)
    assert made.status_code == 200, made.text
    assert asked(server, "eve", "the first one 1") == {200}
    assert asked(server, "eve", "another one 12") == {401}
    changed = {"username": "eve", "password": "the second one 2"}
    assert server.patch(f"{USERS}/update-password", json=changed, auth=ADMIN).status_code == 200
    assert asked(server, "eve", "the first one 1") == {401}
    assert asked(server, "eve", "the second one 2") == {200}
    assert server.request("DELETE", f"{USERS}/delete", json={"username": "eve"}, auth=ADMIN).status_code == 200
    assert asked(server, "eve", "the second one 2") == {401}


def test_requests_of_a_known_user_cost_no_hash(server: httpx.Client) -> None:
    """By CPU time of the workers: hashing costs tens of milliseconds, and most requests check the password twice."""
    asked(server, "admin", "of-the-admin-91")
    before = cpu(server)
    for _ in range(40):
        assert server.post(SEARCH, json={"max_results": 1}, auth=ADMIN).status_code == 200
    right = cpu(server) - before
    for _ in range(10):
        assert server.post(SEARCH, json={"max_results": 1}, auth=("admin", "a wrong password")).status_code == 401
    wrong = cpu(server) - before - right
    print(f"{right / 40:.4f} s of CPU for each request, {wrong / 10:.4f} s with a wrong password")  # noqa: T201
    assert right / 40 < wrong / 10


def cpu(server: httpx.Client) -> float:
    """The seconds of CPU that MLflow's processes have used."""
    main = psutil.Process(int(server.headers["vectorclm-pid"]))
    return sum(sum(process.cpu_times()[:2]) for process in (main, *main.children(recursive=True)))
