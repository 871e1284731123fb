"""Local data files: finding the files of a split in a folder and its sub-folders, and hashing their content.

File names and folders must not change a result, so files are ordered by their SHA-256.
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vectorclm.corpus.file_formats import TEXT, labels_of, suffix_format, titles
from vectorclm.errors import DataError

SHOWN = 3  # names in a message about files that are not read

# Words in a file's name, as `datasets` knows them, and the split that each stands for.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}


class FolderFiles(NamedTuple):
    """The data files of a split, ordered by the SHA-256 of their content, and why the others are not read."""

    read: list[Path]
    left_out: dict[Path, str]


def find_files(place: Path, split: str) -> list[Path]:
    """Find the data files of `split` at `place`, a folder or one file; see `list_folder`.

    A single file belongs to every split. Returns an empty list where there are none.
    """
    if place.is_file():
        return [place]
    return list_folder(place, split).read


def list_folder(place: Path, split: str) -> FolderFiles:
    """List the files of a folder and its sub-folders: those that are read for `split`, and the reason for each other.

    A word of the file's name states the split, as in `test-00000-of-00002.parquet`, or the name of its folder; where
    neither does in any file, all files belong to `train`. Text files are read where there are no files of another
    format, which a text such as a licence only accompanies. Hidden files are ignored.
    """
    left_out: dict[Path, str] = {}
    found = {path: suffix_format(path) for path in _visible_files(place, left_out)}
    tables = [path for path, known in found.items() if known not in (None, TEXT)]
    files = tables or [path for path, known in found.items() if known is TEXT]
    accompanying = {labels_of(path) for path in files}
    for path, known in found.items():
        if path not in files and path not in accompanying:
            left_out[path] = f"text beside {titles(tables=True)} files" if known is TEXT else "its format is not read"
    splits = {path: _split_in(path.name) or _folder_split(path.parent, place) for path in files}
    if any(splits.values()):
        wanted = SPLIT_WORDS.get(split, split)
        for path, own in splits.items():
            if own != wanted:
                left_out[path] = f"its name says {own}" if own else "other names state a split, and this one does not"
    elif split != "train":
        left_out |= dict.fromkeys(files, f"no name says {split}")
    return FolderFiles(sorted((path for path in files if path not in left_out), key=content_hash), left_out)


def _visible_files(place: Path, left_out: dict[Path, str]) -> Iterator[Path]:
    """The files below a folder that are not hidden; links to folders are not followed, and left out by name."""
    for root, folders, names in os.walk(place):
        visible = sorted(name for name in folders if not name.startswith("."))
        left_out |= {Path(root, name): "a link to a folder" for name in visible if Path(root, name).is_symlink()}
        folders[:] = visible
        yield from (
            Path(root, name) for name in sorted(names) if not name.startswith(".") and Path(root, name).is_file()
        )


def _folder_split(folder: Path, place: Path) -> str | None:
    """The split that the name of a sub-folder is, as in `data/train/a.parquet`."""
    return SPLIT_WORDS.get(folder.name.lower()) if folder != place else None


def why_left_out(left_out: Mapping[Path, str], place: Path) -> str:
    """The files of a folder that are not read, in one line: the reasons, each with the first names."""
    parts = []
    for reason in dict.fromkeys(left_out.values()):
        names = [str(path.relative_to(place)) for path, why in left_out.items() if why == reason]
        more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
        parts.append(f"{', '.join(names[:SHOWN])}{more} ({reason})")
    return "; ".join(parts)


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
