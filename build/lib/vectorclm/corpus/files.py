"""Local data files: finding the files of a split in a folder, and hashing their content.

File names and folders must not change a result, so files are ordered by their SHA-256.
"""

import functools
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from vectorclm.corpus.file_formats import FORMATS, labels_of
from vectorclm.errors import DataError

FOLDER_SUFFIXES = tuple(suffix for known in FORMATS if known.in_folders for suffix in known.suffixes)

# Words in a file's name, as `datasets` knows them, and the split that each stands for.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


def find_files(place: Path, split: str) -> list[Path]:
    """Find the data files of `split` at `place`, ordered by the SHA-256 of their content.

    `place` is a folder or one file. In a folder, a word of the file's name states the split, as in
    `test-00000-of-00002.parquet`; where no file name states a split, all files belong to `train`. A single file
    belongs to every split. Returns an empty list where there are none.
    """
    if place.is_file():
        return [place]
    if not place.is_dir():
        return []
    files = [path for path in place.iterdir() if path.is_file() and path.name.endswith(FOLDER_SUFFIXES)]
    files = [path for path in files if not path.name.startswith(".")]
    splits = {path: _split_in(path.name) for path in files}
    if any(splits.values()):
        files = [path for path in files if splits[path] == SPLIT_WORDS.get(split, split)]
    elif split != "train":
        files = []
    return sorted(files, key=content_hash)


def _split_in(name: str) -> str | None:
    words = re.split(r"[^a-z0-9]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def content_hash(path: Path) -> str:
    """SHA-256 of a data file and of its labels file, where it has one. Raises DataError where it cannot be read."""
    try:
        own = _sha256(path, *_identity(path))
        labels = labels_of(path)
        return own if labels is None else _joined([own, _sha256(labels, *_identity(labels))])
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}") from error


def revision_of(files: Iterable[Path]) -> str:
    """`sha256:` of the content of all files, independent of their names and order."""
    return "sha256:" + _joined(sorted(content_hash(path) for path in files))


def _joined(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{item}\n" for item in hashes).encode()).hexdigest()


def _identity(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


@functools.cache
def _sha256(path: Path, size: int, mtime: int) -> str:
    """SHA-256 of a file. `size` and `mtime` are part of the cache key, so a changed file is hashed again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
