"""Run the servers of Prefect and MLflow behind a middleware that refuses foreign hosts and origins.

`python -m flows.platform.guard prefect --host HOST --port PORT` is `prefect server start`, and `python -m
flows.platform.guard mlflow …` is `mlflow server …`, each behind the same middleware. Passwords and databases come from
the servers' own variables.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points

import uvicorn
from starlette.types import ASGIApp

from flows.platform.mlflow_pages import training_pages
from flows.platform.page_script import LOGIN, PageScript, asks_first
from flows.platform.password import is_complete
from flows.platform.password_checks import remember_passwords
from flows.platform.public_address import UiAddress
from flows.platform.refusals import Refusals
from flows.platform.report_pages import ReportPages
from flows.platform.retention import kept_days, prefect_settings
from flows.platform.run_origin import RunOrigin
from flows.platform.schedule_updates import ScheduleUpdates
from vectorclm.errors import ConfigError
from vectorclm.inference.guard import LOOPBACK, Guard, allowed_hosts
from vectorclm.store.artifact import Store

OPEN, WITH_USERS = "vectorclm", "vectorclm-basic-auth"  # the entry points of the apps that `mlflow server` starts


def prefect_app() -> ASGIApp:
    """Prefect's server with its services and, of a platform, the reports in its store, behind the guard."""
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    import flows.platform.notify  # noqa: F401 - registers the mail block, with which automations send
    from flows.platform.state_rules import use_platform_policy

    use_platform_policy()
    app: ASGIApp = Refusals(ScheduleUpdates(RunOrigin(create_app(final=True))))
    app = UiAddress(app, os.environ.get("VECTORCLM_URL") or None)
    if (auth := get_current_settings().server.api.auth_string) is not None:
        app = PageScript(app, LOGIN, asks_first)
    if store := os.environ.get("VECTORCLM_STORE"):
        app = ReportPages(app, Store(store), auth.get_secret_value() if auth is not None else None)
    return Guard(app, allowed_hosts(os.environ))


def mlflow_app() -> ASGIApp:
    """MLflow's server without passwords, behind the guard."""
    from mlflow.server.fastapi_app import app

    return Guard(training_pages(app), allowed_hosts(os.environ))


def mlflow_app_with_users() -> ASGIApp:
    """MLflow's server with users and passwords, behind the guard."""
    from mlflow.server.auth import create_app

    remember_passwords()
    return Guard(training_pages(create_app()), allowed_hosts(os.environ))


def serve_prefect(arguments: Sequence[str]) -> None:
    """Serve Prefect's API, UI and services until a signal.

    Raises ConfigError for an incomplete password, and for a VECTORCLM_KEEP_RECORDS that is not a number of days.
    """
    os.environ |= prefect_settings(kept_days(os.environ))  # Prefect reads them when it is imported
    from prefect.settings import get_current_settings

    from flows.platform import attendant

    parser = argparse.ArgumentParser("prefect")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    args, server = parser.parse_args(arguments), get_current_settings().server
    auth = server.api.auth_string
    if auth is not None and not is_complete(auth.get_secret_value()):
        raise ConfigError("PREFECT_SERVER_API_AUTH_STRING must be user:password")
    if store := os.environ.get("VECTORCLM_STORE"):
        attendant.attend(f"http://127.0.0.1:{args.port}/api", auth.get_secret_value() if auth else None, Store(store))
    uvicorn.run(
        prefect_app(),
        host=args.host,
        port=args.port,
        timeout_keep_alive=server.api.keepalive_timeout,
        ws_ping_interval=server.api.websocket_ping_interval,
        ws_ping_timeout=server.api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
    )


def serve_mlflow(arguments: Sequence[str]) -> None:
    """Run `mlflow server` with these options until a signal; `--app-name basic-auth` requires passwords.

    Raises ConfigError where MLflow does not find the applications of this module.
    """
    from mlflow.cli import cli

    parser = argparse.ArgumentParser("mlflow", allow_abbrev=False)
    parser.add_argument("--app-name", choices=["basic-auth"])
    args, rest = parser.parse_known_args(arguments)
    app = OPEN if args.app_name is None else WITH_USERS
    if not entry_points(group="mlflow.app", name=app):
        raise ConfigError(
            "an older version of VectorCLM is installed: run `make install`, or install the package again"
        )
    if args.app_name is not None:
        from mlflow.server.auth import bootstrap_admin_user, get_flask_server_secret_key

        # Before workers start: they would be restarted without end if this fails.
        get_flask_server_secret_key()
        bootstrap_admin_user()
    names = allowed_hosts(os.environ)
    further = names[len(LOOPBACK) :]
    hosts = [pattern for name in names for pattern in (name, f"{name.replace('[', '[[]')}:*")]
    origins = [f"{scheme}://{name}{port}" for name in further for scheme in ("http", "https") for port in ("", ":*")]
    options = ["--app-name", app, "--allowed-hosts", ",".join(hosts)]
    options += ["--cors-allowed-origins", ",".join(origins)] if origins else []
    cli(["server", *rest, *options])


def main(arguments: Sequence[str]) -> int:
    """Run the server that the first argument names; returns 2 after a ConfigError."""
    serve = {"prefect": serve_prefect, "mlflow": serve_mlflow}[arguments[0]]
    try:
        serve(arguments[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
