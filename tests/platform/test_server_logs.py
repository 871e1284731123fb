"""A server that does not start: the last error of its log in one line, or a disk without room."""

import shutil
from pathlib import Path

import pytest

from flows.platform import server_logs
from flows.platform.server_logs import why_not_started
from vectorclm.errors import DiskFullError

LOG = """\
INFO: starting
Traceback (most recent call last):
  File "a.py", line 1, in <module>
sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) no such table: flow
    raise error
ERROR:    Application startup failed. Exiting.
"""


def test_the_last_error_of_the_log_is_named(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    for text, why in (
        (LOG, "sqlalchemy.exc.OperationalError: (sqlite3.OperationalError) no such table: flow"),
        ("error: port 4200 is taken\nbye\n", "error: port 4200 is taken"),
        ("first\nlast\n", "last"),
        ("", "it said nothing"),
    ):
        log.write_text(text)
        assert why_not_started(log) == f"{why}; {log} has the rest"


def test_a_full_disk_is_named_whatever_the_log_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server.log").write_text("--- Logging error ---")
    monkeypatch.setattr(server_logs, "LEAST_FREE", shutil.disk_usage(tmp_path).total + 1)
    with pytest.raises(DiskFullError, match=r"no space left for the database of a server in .*: free some there"):
        why_not_started(tmp_path / "server.log")
