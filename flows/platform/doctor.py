"""`vectorclm up`, `down` and `doctor`: start the platform, stop it, check every part and repair it if possible."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
from filelock import FileLock, Timeout
from rich.console import Console

from flows.platform import password
from flows.platform.config import POOLS, PlatformConfig
from flows.platform.machine_checks import MACHINE, Check, Finding, gpu_finding, gpus
from flows.platform.ownership import (
    check_folders,
    check_listeners,
    ran_here,
    reasons_to_leave_alone,
    recall_credentials,
    remember,
    running_elsewhere,
)
from flows.platform.prefect_server import accepts_writes
from flows.platform.process import Service, ServiceError
from flows.platform.relocation import follow
from flows.tracking.client import EXPERIMENTS_PAGE
from vectorclm.errors import VectorCLMError
from vectorclm.store.artifact import Store

HEARTBEAT_SECONDS = 40  # within which a new worker must send a heartbeat
WRITE_SECONDS = 60  # within which a write must succeed
RUN_SILENT_SECONDS = 75  # more than two heartbeats of a run
TAKE_SECONDS = 20  # within which a worker takes a run that is due


def up(config: PlatformConfig, console: Console) -> None:
    """Start services that do not run, create what is missing in Prefect, and print the links.

    Raises a VectorCLMError where a service does not start: what was started is then stopped again, and services that
    ran before go on.
    """
    _check_settings(config, console)
    if config.prefect_auth is None:
        password.ensure(config.home, f"{config.prefect_url}/api")
    point_at(config)  # with the password
    servers = config.servers()
    if not any(service.process() for service in servers):
        for line in follow(config):
            console.print(line, highlight=False, soft_wrap=True)
    remember(config)
    started: list[Service] = []
    try:
        _start(config, console, started)
    except BaseException:
        for service in reversed(started):
            service.stop()
            console.print(f"{service.name} stopped again", highlight=False)
        raise
    _print_links(config, console)


def _start(config: PlatformConfig, console: Console, started: list[Service]) -> None:
    """Start servers and workers that do not run, and add them to `started`; create what is missing in Prefect."""

    def start(service: Service) -> bool:
        if is_new := service.start():
            started.append(service)
            console.print(f"starting {service.name} …", highlight=False)
        return is_new

    servers = config.servers()
    for service in servers:
        start(service)
    for service in servers:
        service.wait()
    password.settle(config.home, f"{config.prefect_url}/api", own=config.prefect_auth is None)
    problem = _provision(config, lambda line: console.print(line, highlight=False))
    if problem is not None:
        console.print(problem, style="yellow", highlight=False, markup=False)
    since = datetime.now(UTC)
    for service, pool in [found for found in process_workers(config) if start(found[0])]:
        if not _heard(pool, since):
            raise ServiceError(f"{service.name} started, but Prefect received no heartbeat from it: read {service.log}")


def _check_settings(config: PlatformConfig, console: Console) -> None:
    """Check all that may refuse the settings of `up`, so that the files of a running platform stay as they are."""
    point_at(config)  # the store's keys may be settings
    if lost := recall_credentials(config):
        console.print(lost, style="yellow", highlight=False, soft_wrap=True)
    config.check_database()
    for service in [*config.servers(), *config.workers()]:
        service.check()
    store = Store(config.vectorclm_store)
    store.create()
    store.check_writable()


def down(config: PlatformConfig, console: Console) -> None:
    """Stop all services, the workers first. Their runs end, and continue where they stopped after the next `up`."""
    services = [*config.servers(), *config.workers()]
    stopped = [service for service in reversed(services) if service.stop()]
    for service in stopped:
        console.print(f"{service.name} stopped", highlight=False)
    if not stopped:
        message = f"no service of the platform of {config.home} was running: give the --store or --env-file of `up`"
        for line in (message, *running_elsewhere(config.home)):
            console.print(line, highlight=False, soft_wrap=True)


def _print_links(config: PlatformConfig, console: Console) -> None:
    console.print()
    form = f"{config.prefect_page}/deployments/deployment/{_deployment_id(config)}/run"
    for name, link in (
        ("run tiny", form),
        ("Prefect", config.prefect_page),
        ("MLflow", f"{config.mlflow_page}/{EXPERIMENTS_PAGE}"),
        ("store", Store(config.vectorclm_store).uri),
        ("logs", str(config.home / "platform")),
    ):
        console.print(f"{name:>20}  {link}", highlight=False, soft_wrap=True)
    console.print(
        f"{'password':>20}  {password.about(config.home, config.prefect_auth, shown=console.is_terminal)}",
        highlight=False,
        soft_wrap=True,
    )
    if not gpus():
        console.print(f"{'gpu':>20}  none: this machine's workers run on its CPU", highlight=False)


def _provision(config: PlatformConfig, report: Callable[[str], None]) -> str | None:
    from prefect.client.orchestration import get_client

    from flows.platform.provision import provision

    with get_client(sync_client=True) as client:
        return provision(client, report, config)


def _deployment_id(config: PlatformConfig) -> str:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return str(client.read_deployment_by_name("curriculum/tiny").id)


def point_at(config: PlatformConfig) -> None:
    """Have Prefect in this process and its children use the platform. Call it before Prefect is imported."""
    os.environ |= config.client_environment()


@contextmanager
def alone(config: PlatformConfig, console: Console, *, starts: bool) -> Iterator[None]:
    """Lock the platform against other `up`, `down` and `doctor` commands while the block runs.

    If no platform ever ran here, only a command that `starts` one creates the home. Raises ConfigError where other
    users control the platform's folders.
    """
    if not starts and not ran_here(config):
        yield
        return
    check_folders(config)
    config.home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(config.home / "platform.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"waiting for another up, down or doctor of {config.home}", highlight=False, soft_wrap=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def doctor(config: PlatformConfig, console: Console) -> bool:
    """Check every part of the platform, repair it if possible, and print a line each; False if a problem is left.

    If `up` started no platform with these settings, doctor reports this, and creates and starts nothing.
    """
    point_at(config)
    with ThreadPoolExecutor(1) as beside:
        found = beside.submit(gpus)

        def gpu(config: PlatformConfig) -> Iterator[Finding]:
            yield gpu_finding(found.result())

        well = _checked(MACHINE, config, console)
        well &= _examine(config, console)
        return _checked((gpu,), config, console) and well


def _examine(config: PlatformConfig, console: Console) -> bool:
    """Check and repair the platform that `up` started with these settings; False if a problem is left."""
    well = True
    if reasons := reasons_to_leave_alone(config):
        for reason in reasons:
            _report(Finding(False, reason), console)
        return False
    if lost := recall_credentials(config):
        well = _report(Finding(False, lost), console)
    well &= _checked((_store,), config, console)
    if lost and not Store(config.vectorclm_store).is_local:
        return False  # a service without them cannot read the store
    if not _checked((_postgres,), config, console):
        return False  # no server starts without its database
    well &= _checked((_servers,), config, console)
    if not config.servers()[0].holds_its_port():
        message = f"the server at {config.prefect_url}, if any, is not this platform's: its content is not checked"
        return _report(Finding(False, message), console)
    return _checked((_database, _inside_prefect, _schedules, _workers, _waiting), config, console) and well


def _checked(checks: Sequence[Check], config: PlatformConfig, console: Console) -> bool:
    well = True
    for check in checks:
        try:
            for finding in check(config):
                well &= _report(finding, console)
        except VectorCLMError as error:
            well = _report(Finding(False, str(error)), console)
        except httpx.HTTPError as error:
            well = _report(Finding(False, f"Prefect does not answer at {config.prefect_url}: {error}"), console)
    return well


def _report(finding: Finding, console: Console) -> bool:
    mark, style = ("ok", "green") if finding.good else ("!!", "red")
    console.print(f"[{style}]{mark}[/] ", end="")
    console.print(finding.what, highlight=False, markup=False, soft_wrap=True)
    return finding.good


def _kept_running(service: Service) -> Finding:
    started = service.start()
    service.wait()
    runs = "runs" if service.port is None else f"answers at port {service.port}"
    return Finding(True, f"{service.name} {runs}" + (", started again" if started else ""))


def _store(config: PlatformConfig) -> Iterator[Finding]:
    store = Store(config.vectorclm_store)
    store.create()
    store.check_writable()
    yield Finding(True, f"store {store.uri} can be read and written")


def _postgres(config: PlatformConfig) -> Iterator[Finding]:
    if (address := config.check_database()) is not None:
        yield Finding(True, f"Postgres answers at {address}")


def _servers(config: PlatformConfig) -> Iterator[Finding]:
    for service in config.servers():
        try:
            yield _kept_running(service)
        except ServiceError as error:  # the next server is still checked
            yield Finding(False, str(error))


def _database(config: PlatformConfig) -> Iterator[Finding]:
    """Check a write through Prefect's API: a locked database stops all writes, and the health check still passes."""
    server = config.servers()[0]
    if accepts_writes(config, WRITE_SECONDS):
        yield Finding(True, "Prefect's database accepts writes")
        return
    server.stop()
    server.start()
    server.wait()
    if accepts_writes(config, WRITE_SECONDS):
        yield Finding(True, f"Prefect's database took no write in {WRITE_SECONDS} s: {server.name} started again")
    else:
        yield Finding(
            False,
            f"Prefect's database accepts no write within {WRITE_SECONDS} s: another program locks it, or its disk "
            f"is full; read {server.log}",
        )


def _inside_prefect(config: PlatformConfig) -> Iterator[Finding]:
    """Probe the services inside Prefect's server, and restore pools, automations and deployments meanwhile."""
    from prefect.client.orchestration import get_client

    from flows.platform import server_services

    log = config.servers()[0].log
    with get_client(sync_client=True) as client, server_services.probe(client, log) as probe:
        unplanned = server_services.unplanned(client)
        try:
            yield from _provisioned(config)
        except VectorCLMError as error:
            yield Finding(False, str(error))
        yield from (Finding(*found) for found in server_services.findings(client, probe, unplanned, log))


def _provisioned(config: PlatformConfig) -> Iterator[Finding]:
    from prefect.client.orchestration import get_client

    from flows.platform.notify import about

    changes: list[str] = []
    problem = _provision(config, changes.append)
    yield from (Finding(True, change) for change in changes)
    yield Finding(True, f"password: {password.about(config.home, config.prefect_auth, shown=False)}")
    yield Finding(True, "pools, automations and deployments are as they should be")
    with get_client(sync_client=True) as client:
        yield Finding(problem is None, problem or about(client, config))


def _schedules(config: PlatformConfig) -> Iterator[Finding]:
    """Report which schedules start no runs, because a person switched them off or never on."""
    from prefect.client.orchestration import get_client

    from flows.platform.server_services import idle_schedules

    with get_client(sync_client=True) as client:
        idle = idle_schedules(client)
    for what, deployment_id in idle:
        page = f"{config.prefect_page}/deployments/deployment/{deployment_id}"
        yield Finding(True, f"{what}, so they start no run; the switch is on the page of the deployment: {page}")
    if not idle:
        yield Finding(True, "every schedule is on")


def _workers(config: PlatformConfig) -> Iterator[Finding]:
    since = datetime.now(UTC)
    mine = process_workers(config)
    for pool in set(POOLS) - {pool for _, pool in mine}:
        yield Finding(True, f"pool {pool} is not of type process: {_heard(pool, None)} other worker(s) online")
    for service, pool in mine:
        again = service.start()
        online = _heard(pool, since if again else None)
        if online:
            yield Finding(True, f"pool {pool} has {online} worker(s) online{', started again' if again else ''}")
        else:
            yield Finding(False, f"pool {pool} has a worker process but no heartbeat: read {service.log}")


def _waiting(config: PlatformConfig) -> Iterator[Finding]:
    """Report late runs that nothing delays, and runs without heartbeats; new workers and servers get time first.

    A scheduled run that no worker takes is also an event, for notifications.
    """
    from prefect.client.orchestration import get_client

    from flows.platform.missed_runs import report_missed
    from flows.platform.server_services import late_runs, silent_runs

    begun, since = time.monotonic(), datetime.now(UTC) - timedelta(seconds=RUN_SILENT_SECONDS)
    with get_client(sync_client=True) as client:
        while (late := late_runs(client)) and time.monotonic() < begun + TAKE_SECONDS:
            time.sleep(0.5)
        missed = report_missed(client)
        while (silent := silent_runs(client, since)) and time.monotonic() < begun + HEARTBEAT_SECONDS:
            time.sleep(1)
    logs = ", ".join(str(service.log) for service in config.workers())
    for line in late:
        yield Finding(
            False, f"{line}: read the log of its worker ({logs}), and check whether the pool or queue is paused"
        )
    yield from (Finding(False, line) for line in [*missed, *silent])
    if not late and not missed:
        yield Finding(True, "no run is late without a reason")
    if not silent:
        yield Finding(True, "every run that shows Running sends heartbeats")


def process_workers(config: PlatformConfig) -> list[tuple[Service, str]]:
    """The workers that `up` starts, each with its pool: those of pools of type `process`.

    The worker of a pool that became a cluster's is stopped. Raises ConfigError where a stranger would get a password.
    """
    check_listeners(config)
    from prefect.client.orchestration import get_client

    found = []
    with get_client(sync_client=True) as client:
        for service, pool in zip(config.workers(), POOLS, strict=True):
            if client.read_work_pool(pool).type == "process":
                found.append((service, pool))
            else:
                service.stop()
    return found


def _heard(pool: str, since: datetime | None) -> int:
    """The number of workers of a pool that are online; with `since`, wait for a heartbeat after that time."""
    from prefect.client.orchestration import get_client

    deadline = time.monotonic() + HEARTBEAT_SECONDS
    with get_client(sync_client=True) as client:
        while True:
            online = [worker for worker in client.read_workers_for_work_pool(pool) if worker.status == "ONLINE"]
            heard = [worker.last_heartbeat_time for worker in online if worker.last_heartbeat_time is not None]
            if since is None or any(when > since for when in heard) or time.monotonic() > deadline:
                return len(online) if since is None or any(when > since for when in heard) else 0
            time.sleep(0.5)
