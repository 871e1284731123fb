"""The errors of VectorCLM; each message tells the person who must act what to do.

VectorCLMError
├── ConfigError      a setting is unknown, impossible or contradictory: edit it, a retry cannot help
├── DataError        a source, a document or a model directory is missing or malformed
├── StoreError       the store cannot be reached or written: a retry may help
│   ├── DiskFullError          no space is left on a disk: free some, then retry
│   └── CorruptArtifactError   bytes in the store differ from their manifest
│       └── CorruptBlockError  bytes of one block of a shard differ, also when read again
├── InUseError       another live process is building the same artifact
├── OutOfMemoryError the tensors do not fit: lower micro_batch_size, a retry at the same size cannot help
├── PreemptedError   SIGTERM ended a training after a checkpoint: run the same command again
├── RankLostError    another rank of a training ended, cannot be reached or hangs: run the same command again
├── WorkerLostError  a worker process of a stage ended: run the same command again
├── ReproducibilityError   a rebuilt artifact differs: compare versions and machines, a retry cannot help
└── DivergedError    the loss is not finite: change the settings, a retry cannot help
"""

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk is full, a quota, a limit of the process
FREE_SPACE = (
    "free some there (`df -h` shows the disks; `vectorclm store gc --older-than 1h --delete`, with the --store of the "
    "run, removes what killed processes left), then retry"
)
FAILED = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV)  # remounted read-only, broken, gone from the server
NO_FILES = (errno.EMFILE, errno.ENFILE)  # no further file can be opened, by this process or by any
NO_FILES_TOLD = (*map(os.strerror, NO_FILES), "Unable to open /dev/urandom")  # by libraries; the last by torch
MORE_FILES = "raise the limit of open files (`ulimit -n` shows it), then retry"
CHECK_DISK = "check the disk or the share (`mount` and `dmesg` show its state), then retry"


class VectorCLMError(Exception):
    """Base class of every error that this package raises on purpose; the message says what to do."""


class ConfigError(VectorCLMError):
    """A setting is unknown, impossible, or contradicts another."""


class DataError(VectorCLMError):
    """A source, a document or a model directory is missing or malformed."""


class StoreError(VectorCLMError):
    """The store cannot be read or written."""


class DiskFullError(StoreError):
    """No space is left where a file is written; what was finished before is kept."""


class CorruptArtifactError(StoreError):
    """The bytes of an artifact differ from its manifest."""


class CorruptBlockError(CorruptArtifactError):
    """The bytes of one block of a shard differ from the manifest each time they are read."""


class InUseError(VectorCLMError):
    """Another live process holds the lease on this artifact."""


class OutOfMemoryError(VectorCLMError):
    """A step needs more memory than the device or the machine has."""


class PreemptedError(VectorCLMError):
    """SIGTERM ended a training; the same command resumes from the checkpoint."""


class RankLostError(VectorCLMError):
    """Another rank of a training, or its node, is lost; the same command resumes from the newest checkpoint."""


class WorkerLostError(VectorCLMError, ChildProcessError):
    """A process that worked for a stage was killed; the same command goes on with what is finished."""


class ReproducibilityError(VectorCLMError):
    """A stage that was built again, with equal settings and inputs, produced other bytes."""


class DivergedError(VectorCLMError):
    """The loss is no longer finite."""


def shortened(error: object, most: int = 300) -> str:
    """The message of a library's error in one line of at most so many characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def disk_error(error: BaseException, where: str = "") -> StoreError | None:
    """The error that says what to do about a disk that is full or fails, or about too many open files.

    None where `error` has another cause. `where` is what was being written; without it, the file that `error` names.
    """
    if isinstance(error, VectorCLMError):
        return None
    number = getattr(error, "errno", None)
    name = where or getattr(error, "filename", None)
    if number in FULL or any(f"(os error {code})" in str(error) for code in FULL):
        return DiskFullError(f"no space left{f' while writing {name}' if name else ''}: {FREE_SPACE}")
    known = [*(f"(os error {code})" for code in NO_FILES), *NO_FILES_TOLD]
    if number in NO_FILES or any(text in str(error) for text in known):
        return StoreError(f"{name or 'a file'} cannot be opened (too many open files): {MORE_FILES}")
    if number in FAILED and name:
        return StoreError(f"{name} cannot be read or written ({os.strerror(number)}): {CHECK_DISK}")
    return None
