"""The queue for a server that may be away: order, repetition, giving up."""

import threading
import time
from contextvars import ContextVar

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from flows.tracking import outbox
from flows.tracking.outbox import ATTEMPTS, Outbox
from tests.services.platform import until


class Server:
    """A server that is away at first, and keeps what it accepted."""

    def __init__(self, answers: bool, failures: int, error: Exception) -> None:
        self.answers, self.failures, self.error = answers, failures, error
        self.accepted: list[str] = []
        self.errors: list[Exception] = []
        self.asked = threading.Event()

    def job(self, name: str) -> None:
        if name == "hard" and self.failures:
            self.failures -= 1
            raise self.error
        self.accepted.append(name)

    def probe(self) -> bool:
        self.asked.set()
        return self.answers

    def outbox(self, *names: str) -> Outbox:
        box = Outbox(lambda: None, self.errors.append, self.probe)
        for name in names:
            box.put(lambda name=name: self.job(name))  # type: ignore[misc]
        box.start()
        return box


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "AWAY_SECONDS", 0.01)
    monkeypatch.setattr(outbox, "POLL_SECONDS", 0.01)


def test_a_job_waits_for_its_server_and_the_order_stays() -> None:
    server = Server(False, 20, ConnectionError("away"))
    box = server.outbox("first", "hard", "last")
    until(lambda: "last" in server.accepted, "the server is back", 60)  # closed while it is away, the queue gives up
    assert box.close(10) and box.left == 0 and len(server.errors) == 20
    assert server.accepted == ["first", "hard", "last"]


def test_a_job_that_a_living_server_rejects_does_not_block_the_queue() -> None:
    server = Server(True, 100, MlflowException("not now"))
    assert server.outbox("first", "hard", "last").close(10)
    assert server.accepted == ["first", "last"] and len(server.errors) == ATTEMPTS
    wrong = Server(True, 100, MlflowException("never", INVALID_PARAMETER_VALUE))
    assert wrong.outbox("hard", "last").close(10)
    assert wrong.accepted == ["last"] and len(wrong.errors) == 1


def test_a_server_that_stays_away_ends_the_queue_at_its_close() -> None:
    server = Server(False, 10**9, ConnectionError("away"))
    box = server.outbox("first", "hard", "last")
    assert server.asked.wait(10) and box.close(10)
    assert server.accepted == ["first"] and box.left == 3  # the job, the one behind it, and the end


def test_a_slow_server_is_waited_for_as_long_as_it_takes_jobs_and_no_longer() -> None:
    def box(*seconds: float) -> Outbox:
        made = Outbox(lambda: None, lambda error: None, lambda: True)
        for each in seconds:
            made.put(lambda each=each: time.sleep(each))  # type: ignore[misc]
        made.start()
        return made

    assert box(0.8, 0.8, 0.8, 0.8).close(2)  # together they take longer than one may
    assert not box(0.01, 30).close(1)


def test_between_jobs_the_idle_work_is_done_and_its_error_is_reported() -> None:
    errors, called = list[Exception](), threading.Event()

    def idle() -> None:
        called.set()
        raise ValueError("idle")

    box = Outbox(idle, errors.append, lambda: True)
    box.start()
    assert called.wait(10) and box.close(10)
    assert {str(error) for error in errors} == {"idle"}


def test_a_failure_is_reported_in_the_context_of_the_maker() -> None:
    """Prefect finds in it the run whose log receives a warning."""
    run: ContextVar[str] = ContextVar("run", default="none")
    run.set("a run")
    found: list[str] = []
    box = Outbox(lambda: None, lambda error: found.append(run.get()), lambda: True)
    box.put(lambda: [].pop())
    box.start()
    assert box.close(60) and found == ["a run"]
