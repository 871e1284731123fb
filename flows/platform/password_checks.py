"""Remember in memory which passwords of MLflow's users were right, as each check of a hash costs tens of milliseconds.

MLflow checks the password of each request anew. Its own cache goes on accepting a password that was changed through
another worker process; this one compares with the hash that MLflow reads from its database for each request.
"""

import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable

REMEMBERED_SECONDS = 300
MOST = 1000  # passwords
CHECK = "check_password_hash"  # the name of Werkzeug's function in MLflow's module

logger = logging.getLogger(__name__)


class RememberedPasswords:
    """A check of passwords against their hashes that hashes a right password once in REMEMBERED_SECONDS.

    Only a digest is kept, with a key of this process, of the stored hash and the password together. A wrong password is
    hashed each time, and a changed one or another user's has another hash.
    """

    def __init__(self, check: Callable[[str, str], bool]) -> None:
        self._check = check
        self._key = secrets.token_bytes(32)
        self._until: dict[bytes, float] = {}
        self._lock = threading.Lock()

    def __call__(self, stored: str, password: str) -> bool:
        """Whether the password is the one of the stored hash."""
        known = hmac.digest(self._key, f"{stored}\0{password}".encode(), "sha256")
        now = time.monotonic()
        with self._lock:
            if self._until.get(known, 0.0) > now:
                return True
        if not self._check(stored, password):
            return False
        with self._lock:
            if len(self._until) >= MOST:
                self._until.clear()
            self._until[known] = now + REMEMBERED_SECONDS
        return True


def remember_passwords() -> None:
    """Have this process check the passwords of MLflow's users by RememberedPasswords; call it once."""
    from mlflow.server.auth import sqlalchemy_store as users

    if (check := getattr(users, CHECK, None)) is None:
        logger.warning("this version of MLflow checks passwords elsewhere, so each request costs a hash")
    else:
        setattr(users, CHECK, RememberedPasswords(check))
