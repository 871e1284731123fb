"""Copies of files at addresses such as `s3://bucket/folder` or `https://…`, in the cache folder of this machine."""

import glob
import hashlib
import shutil
from pathlib import Path, PurePosixPath

import fsspec

from vectorclm.errors import DataError
from vectorclm.runtime.temporary import temporary_folder
from vectorclm.settings import digest
from vectorclm.store import s3
from vectorclm.store.hash_memory import cache_folder

PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "http", "https", "hf", "memory")


def is_address(text: str) -> bool:
    """Whether a text names a protocol, as `s3://bucket/texts` does."""
    return "://" in text


def fetch(address: str) -> Path:
    """Copy a file, a folder or the files of a pattern to the cache folder; return the copy.

    A copy is made again where a file's size, date or ETag changed. Raises DataError where the files cannot be read.
    """
    protocol = address.partition("://")[0]
    if protocol not in PROTOCOLS or "::" in address:
        raise DataError(f"{address} cannot be opened: use a local path, or one of {_known()}")
    try:
        fs, root = fsspec.core.url_to_fs(address, use_listings_cache=False, **s3.options(protocol, s3.PATIENT))
        return _copied(fs, str(root).rstrip("/"), address)
    except ImportError as error:
        raise DataError(f"{address} cannot be opened: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"there are no files at {address}") from error
    except DataError:
        raise
    except Exception as error:  # each file system has errors of its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{address} cannot be read: {first}; check the address and the credentials") from error


def _copied(fs: fsspec.AbstractFileSystem, root: str, address: str) -> Path:
    pattern = glob.has_magic(root) and not address.startswith("http")
    single = not pattern and (address.startswith("http") or fs.isfile(root))
    found = [root] if single else sorted(fs.glob(root) if pattern else fs.find(root))
    files = [str(path) for path in found if single or fs.isfile(path)]
    if not files:
        raise FileNotFoundError(address)
    named = root if single else root[: _first_magic(root)] if pattern else f"{root}/"
    base = named.rpartition("/")[0]
    key = digest([address, *([path, str(fs.ukey(path))] for path in files)])
    folder = cache_folder() / "sources" / key
    if not folder.is_dir():
        _download(fs, {path: _inside(path, base) for path in files}, folder)
    return folder / _inside(root, base) if single else folder


def _first_magic(path: str) -> int:
    return min(path.find(character) for character in "*?[" if character in path)


def _inside(path: str, base: str) -> str:
    """The path of a copy below its folder; a name that leads out of the folder, or is too long, is replaced."""
    name = path.removeprefix(base).partition("?")[0].strip("/")
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or any(len(part.encode()) > 200 for part in parts):
        return hashlib.sha256(path.encode()).hexdigest()[:16] + "".join(PurePosixPath(name).suffixes[-2:])[:20]
    return name


def _download(fs: fsspec.AbstractFileSystem, names: dict[str, str], folder: Path) -> None:
    """Copy all files into a temporary folder, which then gets its name as a whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(place=folder.parent) as temporary:
        part = temporary / "files"
        for path, name in names.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(path, str(part / name))
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
            shutil.rmtree(part, ignore_errors=True)


def _known() -> str:
    return ", ".join(f"{name}://" for name in PROTOCOLS if name != "memory")
