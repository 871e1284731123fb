"""A real MLflow server for tests, started as `vectorclm up` starts it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

from flows.net import answers
from tests.services.platform import until


class MLflowServer:
    """An MLflow server with a SQLite database, which tests stop, suspend, fill and repair."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "flows.platform.guard", "mlflow", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder
            )
        try:
            until(lambda: answers(f"{self.uri}/health"), "MLflow serves", 300)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        os.killpg(self.process.pid, 15)
        self.process.wait(60)

    def suspend(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def fill(self) -> None:
        """Act as if the disk were full: no file can grow or be created."""
        self._limit(1)

    def free(self) -> None:
        self._limit(psutil.RLIM_INFINITY)

    def _limit(self, size: int) -> None:
        main = psutil.Process(self.process.pid)
        for process in (main, *main.children(recursive=True)):
            process.rlimit(psutil.RLIMIT_FSIZE, (size, psutil.RLIM_INFINITY))
