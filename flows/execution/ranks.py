"""torchrun with the exit code of the first rank that failed: `python -m flows.execution.ranks OPTION … COMMAND …`.

torchrun itself always exits with 1, and leaves the folder of its ranks' error files behind.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from vectorclm.runtime.temporary import temporary_folder


def run(arguments: list[str]) -> int:
    """Run torchrun; returns the exit code of the first failed rank, or 128 + n if signal n ended it or torchrun."""
    with temporary_folder() as folder:
        try:
            main(["--log-dir", str(folder), *arguments])
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:
                return int(failure.exitcode)
            sys.stderr.write(f"rank {rank}: {failure.message}\n")
            return 128 - int(failure.exitcode)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
