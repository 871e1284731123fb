"""torchrun with the exit code of the first rank that failed: `python -m flows.execution.ranks OPTION … COMMAND …`.

torchrun itself always exits with 1, and leaves the folder of its ranks' error files behind. Where another node is lost,
it waits for that node's rendezvous for minutes, and does not notice the end of its own ranks.
"""

import os
import sys
import threading
import time
from pathlib import Path

import psutil
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from vectorclm.runtime.temporary import temporary_folder

UNNOTICED_SECONDS = 10  # after which torchrun, which looks ten times a second, hangs


def run(arguments: list[str]) -> int:
    """Run torchrun; returns the exit code of the first failed rank, or 128 + n if signal n ended it or torchrun."""
    with temporary_folder() as folder:
        try:
            main(["--log-dir", str(folder), *_without_listener(arguments, folder / "rendezvous")])
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                return int(failure.exitcode)
            sys.stderr.write(f"rank {rank}: {failure.message}\n")
            return 128 - int(failure.exitcode)
    return 0


def _without_listener(arguments: list[str], file: Path) -> list[str]:
    """The arguments with a rendezvous in a file, which lies in a private folder, in place of `--standalone`.

    `--standalone` listens on all interfaces without a password, and torchrun unpickles what others write there.
    """
    if "--standalone" not in arguments:
        return arguments
    options = [
        "--rdzv-backend=c10d",
        "--rdzv-conf=store_type=file",
        f"--rdzv-endpoint={file}",
        "--local-addr=127.0.0.1",
    ]
    return [*options, *(argument for argument in arguments if argument != "--standalone")]


def end_with_ranks() -> None:
    """End this process where all ranks have ended and torchrun does not notice that."""
    since = time.monotonic()
    while True:
        time.sleep(1)
        ranks = psutil.Process().children()
        if not ranks or any(_lives(rank) for rank in ranks):
            since = time.monotonic()
        elif time.monotonic() - since > UNNOTICED_SECONDS:
            ended = os.waitid(os.P_PID, ranks[0].pid, os.WEXITED | os.WNOWAIT)
            sys.stderr.write("all ranks of this node have ended, but torchrun waits for another node: it ends, too\n")
            code = 0 if ended is None else ended.si_status
            os._exit(code if ended is None or ended.si_code == os.CLD_EXITED else 128 + code)


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


if __name__ == "__main__":
    threading.Thread(target=end_with_ranks, daemon=True, name="ranks").start()
    sys.exit(run(sys.argv[1:]))
