"""torchrun that ends as its first failed rank did: `python -m flows.execution.ranks OPTION … COMMAND …`.

torchrun itself always ends with 1, and leaves the folder in which its ranks write their errors.
"""

import sys
import tempfile

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(arguments: list[str]) -> int:
    """Run torchrun; the exit code of the rank that failed first, or 128 + n where signal n ended it, or torchrun."""
    with tempfile.TemporaryDirectory(prefix="vectorclm-") as folder:
        try:
            main(["--log-dir", folder, *arguments])
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
