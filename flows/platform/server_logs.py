"""Why a server did not start: the disk is full, or the last error in its log."""

import re
import shutil
from pathlib import Path

from vectorclm.errors import FREE_SPACE, DiskFullError

LEAST_FREE = 2 * 2**20  # bytes; SQLite and the log itself cannot be written with less
ERROR = re.compile(r"^(ERROR:\s+)?[A-Za-z_][\w.]*(Error|Exception|Failure)\b.*|^error: .*", re.MULTILINE)


def why_not_started(log: Path) -> str:
    """The cause in one line, with the place of the log. Raises DiskFullError where the log's disk has no room."""
    if shutil.disk_usage(log.parent).free < LEAST_FREE:
        raise DiskFullError(f"no space left for the database of a server in {log.parent}: {FREE_SPACE}")
    text = log.read_text(errors="replace").strip()
    errors = [found.group(0).strip() for found in ERROR.finditer(text)]
    last = errors[-1] if errors else text.rpartition("\n")[2].strip()
    return f"{last[:300] or 'it said nothing'}; {log} has the rest"
