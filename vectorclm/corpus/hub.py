"""Streams of data sets from the Hugging Face hub, and its failures as errors that say what to do."""

import atexit
import time
from functools import cache
from typing import TYPE_CHECKING

from vectorclm.corpus.sources import Source, describe
from vectorclm.errors import DataError

if TYPE_CHECKING:  # `datasets` takes a second to import, and a training process reads no source
    from datasets import IterableDataset

END_OF_READERS = 0.5  # seconds


@cache
def _let_readers_end() -> None:
    """Delay the end of this process until Arrow's threads have freed their files, once for each process.

    A thread of Arrow that frees a file of Python while Python ends aborts the whole process, with all its work done
    (https://github.com/apache/arrow/issues/45214). Arrow cannot be asked whether it has ended; `datasets` sleeps too.
    """
    atexit.register(time.sleep, END_OF_READERS)


def open_hub(source: Source) -> "IterableDataset":
    """Open a hub data set as a stream of rows. Raises DataError where the hub cannot deliver it."""
    from datasets import load_dataset
    from huggingface_hub import HfApi

    if (source.revision or "").startswith("sha256:"):
        raise DataError(
            f"{describe(source)} is pinned to local content ({source.revision}): "
            "give the folder that holds it with --data DIR"
        )
    _let_readers_end()
    try:
        # The hub is asked first, because load_dataset hides some failures behind an older run's cache.
        HfApi().dataset_info(source.path, revision=source.revision, timeout=60)
        stream = load_dataset(
            source.path,
            name=source.name,
            data_dir=source.data_dir,
            data_files=source.data_files,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        return stream if stream.column_names else stream._resolve_features()
    except Exception as error:
        raise hub_error(source, error) from error


def hub_error(source: Source, error: Exception) -> DataError:
    """Translate a failure of the hub or its client into a DataError that says what to do."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where, mirror = describe(source), "or give a local mirror with --data DIR"
    if isinstance(error, RevisionNotFoundError):
        return DataError(
            f"{where}: the hub has no revision {source.revision}, or no longer has it. Remove it from the experiment, "
            f"or from the .lock.json beside it, to pin the current revision, {mirror}"
        )
    if isinstance(error, GatedRepoError):
        return DataError(f"{where} is gated: accept its terms on the hub and log in, {mirror}")
    if isinstance(error, RepositoryNotFoundError | DatasetNotFoundError):
        return DataError(f"{where}: the hub has no such data set, or it is private: check the id, {mirror}")
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, ValueError | TypeError | KeyError | DatasetsError):
        return DataError(f"{where}: {first}")
    return DataError(f"{where}: cannot read from the hub: {first}. Check the network and HF_ENDPOINT, {mirror}")
