"""`vectorclm chaos` for some minutes on a disk and on a real S3 server; the results go to a file, and add up.

python -m tests.chaos.runs SEED MINUTES [disk|s3]    adds to tests/chaos/results.jsonl
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import s3fs

from tests.services.ceph import object_store

RESULTS = Path(__file__).with_name("results.jsonl")
KEYS = ("of-the-tests", "secret-of-the-tests")


def chaos(store: str, options: list[str], environment: dict[str, str]) -> int:
    """Run the command; returns its exit code."""
    command = [sys.executable, "-m", "vectorclm", "chaos", "--store", store, *options]
    return subprocess.run(
        [*command, "--results", str(RESULTS)], env={**os.environ, **environment}, check=False
    ).returncode


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """A real S3 server with the bucket `chaos`; yields the variables by which a client finds it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    services = object_store(folder / "ceph", folder / "logs", port, *KEYS)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        for service in services:
            service.start()
            service.wait()
        s3fs.S3FileSystem(key=KEYS[0], secret=KEYS[1], endpoint_url=endpoint).mkdir("chaos")
        yield {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": KEYS[0],
            "AWS_SECRET_ACCESS_KEY": KEYS[1],
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        for service in reversed(services):
            service.stop()


def main(seed: str, minutes: str, where: str = "both", *kinds: str) -> int:
    """Run on a disk, on S3, or on both; returns the larger exit code."""
    code = 0
    options = ["--seed", seed, "--minutes", minutes, *(word for kind in kinds for word in ("--only", kind))]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        if where != "s3":
            code = chaos(f"{name}/store", options, {})
        if where != "disk":
            with s3_server(Path(name)) as environment:
                code = max(code, chaos("s3://chaos/store", options, environment))
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
