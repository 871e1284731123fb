"""Run a server's own command, with its secrets by input or environment only."""

import os
import subprocess

from flows.platform.process import START_SECONDS, ServiceError


def run_tool(command: list[str], what: str, *, secret_input: str | None = None, **environment: str) -> str:
    """Run a command and return its standard output; secrets are passed by input or environment only.

    Raises ServiceError, naming the task `what`, with the last lines of the command's output.
    """
    try:
        done = subprocess.run(
            command,
            input=secret_input or "",
            env={**os.environ, **environment},
            cwd="/",  # its user may have no access to our folder
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ServiceError(f"{what} took more than {START_SECONDS} s: {command[0]} does not end") from error
    if done.returncode:
        words = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise ServiceError(f"{what} failed:\n{words}")
    return done.stdout
