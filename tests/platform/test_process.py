"""A service of the platform: it outlives its command, is found again, holds its port alone, and leaves no child."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.net import answers, free_port
from flows.platform import process
from flows.platform.process import HOST, Service, ServiceError, holder, listens
from tests.services.platform import until

SLEEPS = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(600)"]
SERVES = "import socket, sys, time; s = socket.create_server(({host!r}, {port})); {then}time.sleep(600)"
HARD = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


def serves(port: int, then: str = "") -> list[str]:
    return [sys.executable, "-c", SERVES.format(host=HOST, port=port, then=then)]


def has_ended(child: psutil.Process) -> bool:
    return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE  # which nobody has asked for


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "platform"


@pytest.fixture
def sleeper(folder: Path) -> Iterator[Service]:
    service = Service("sleeper", SLEEPS, {"OF_THE_SERVICE": "s3cr3t"}, folder)
    yield service
    service.stop()


def test_a_service_outlives_its_command_and_is_found_again(sleeper: Service) -> None:
    source = f"""
from pathlib import Path
from flows.platform.process import Service
print(Service("sleeper", {sleeper.command!r}, {dict(sleeper.environment)!r}, Path({str(sleeper.folder)!r})).start())
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    found = sleeper.process()
    assert found is not None and found.cmdline()[1:] == SLEEPS[1:]
    assert sleeper.start() is False and sleeper.process() == found  # it runs: nothing is started
    until(lambda: sleeper.log.read_text() == "begun\n", "its output is in its log", 60)
    assert sleeper.log.stat().st_mode & 0o077 == sleeper.record.stat().st_mode & 0o077 == 0
    assert "s3cr3t" not in sleeper.record.read_text()
    shutil.copytree(sleeper.folder, sleeper.folder.parents[1] / "copy")  # by a backup of a platform that runs
    copy = dataclasses.replace(sleeper, folder=sleeper.folder.parents[1] / "copy")
    assert (
        copy.record.exists()
        and not copy.was_started()
        and copy.process() is None
        and copy.stop() is False
        and found.is_running()
    )
    assert sleeper.stop() is True
    assert not found.is_running() and not sleeper.record.exists() and sleeper.stop() is False


def test_a_service_with_other_settings_must_be_stopped_first(sleeper: Service) -> None:
    sleeper.start()
    other = Service("sleeper", SLEEPS, {"OF_THE_SERVICE": "another"}, sleeper.folder)
    proxied = Service("sleeper", SLEEPS, {**sleeper.environment, "NO_PROXY": "x", "no_proxy": "x"}, sleeper.folder)
    assert (sleeper.has_these_settings(), other.has_these_settings(), proxied.has_these_settings()) == (
        True, False, True
    )  # fmt: skip
    with pytest.raises(ServiceError, match="sleeper runs with other settings: run `vectorclm down`"):
        other.start()


def test_the_record_of_another_process_names_none(sleeper: Service) -> None:
    """After a restart of the machine, another program may have the number of the process."""
    sleeper.start()
    record = json.loads(sleeper.record.read_text())
    sleeper.stop()
    for text in (json.dumps({**record, "pid": os.getpid()}), "not JSON", ""):
        sleeper.record.write_text(text)
        assert sleeper.process() is None
    assert sleeper.start() is True and sleeper.process() is not None


def test_a_service_waits_until_it_answers_and_holds_its_port(folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "http.server", str(port), "--bind", HOST]
    service = Service("web", command, {}, folder, port, ready=lambda: answers(f"http://{HOST}:{port}/"))
    try:
        assert not listens(port) and holder(port) is None
        service.start()
        service.wait()
        assert answers(f"http://{HOST}:{port}/") and listens(port) and service.holds_its_port()
        found = service.process()
        assert found is not None
        assert holder(port) == f"web of the platform of {folder.parent} (process {found.pid})"
        twin = Service("twin", command, {}, folder, port)
        with pytest.raises(ServiceError, match=f"port {port} is taken by web of the platform of .*: end it, or give"):
            twin.start()
    finally:
        service.stop()
    assert not listens(port)


def test_what_a_service_says_last_is_in_its_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[bool] = []
    source = "import sys; [print('line', n) for n in range(20)]; sys.exit('no database')"
    service = Service(
        "broken", [sys.executable, "-c", source], {}, folder, ready=lambda: False, prepare=lambda: prepared.append(True)
    )
    service.start()
    assert prepared == [True]
    with pytest.raises(ServiceError, match=r"broken ended during its start; .*broken.log ends with:\nline 6\n") as told:
        service.wait()
    assert str(told.value).endswith("line 19\nno database")
    monkeypatch.setattr(process, "START_SECONDS", 0)
    slow = Service("slow", SLEEPS, {}, folder, ready=lambda: False)
    try:
        slow.start()
        with pytest.raises(ServiceError, match="slow does not answer after 0 s"):
            slow.wait()
    finally:
        slow.stop()


def test_a_stopped_service_leaves_no_descendant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that ignores SIGTERM, nor one whose parent was killed before."""
    monkeypatch.setattr(process, "STOP_SECONDS", 0.5)
    port = free_port()
    child = serves(port, HARD)
    parent = [sys.executable, "-c", f"import subprocess; subprocess.run({child!r})"]
    service = Service("family", parent, {}, folder, port, ready=lambda: listens(port))
    for killed in (False, True):
        service.start()
        service.wait()
        leader = service.process()
        assert leader is not None
        (orphan,) = leader.children(recursive=True)
        if killed:
            leader.kill()
            leader.wait(60)
            assert listens(port) and service.process() is None
        else:
            assert service.holds_its_port()  # by its child
        assert service.stop() is not killed
        assert has_ended(orphan) and not listens(port) and not service.holds_its_port()


def test_a_service_that_was_killed_takes_its_port_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its child still listens: it is ended, as no stranger would be."""
    port = free_port()
    parent = [sys.executable, "-c", f"import subprocess; subprocess.run({serves(port)!r})"]
    service = Service("web", parent, {}, folder, port, ready=lambda: listens(port))
    try:
        service.start()
        service.wait()
        leader = service.process()
        assert leader is not None
        (orphan,) = leader.children(recursive=True)
        leader.kill()
        leader.wait(60)
        assert service.start() is True
        service.wait()
        assert has_ended(orphan) and service.holds_its_port()
    finally:
        service.stop()


def test_a_stranger_at_the_port_is_named_and_left_alone(folder: Path) -> None:
    with socket.create_server((HOST, 0)) as stranger:
        port = stranger.getsockname()[1]
        name = f"{psutil.Process().name()} (process {os.getpid()})"
        assert holder(port) == name
        with pytest.raises(ServiceError, match=f"port {port} is taken by ") as told:
            Service("web", serves(port), {}, folder, port).start()
        assert name in str(told.value) and listens(port)


def test_a_server_that_answers_in_place_of_the_service_is_not_taken_for_it(folder: Path) -> None:
    """Somebody's program takes the port between the check and the start; the service ends, as it cannot listen."""
    port = free_port()
    command = [sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(1)"]
    service = Service("a-service", command, {}, folder, port, ready=lambda: True)
    assert service.start()
    with socket.create_server((HOST, port)), pytest.raises(ServiceError, match="ended during its start"):
        service.wait()
    assert not service.holds_its_port()
