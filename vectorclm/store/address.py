"""Addresses of stores: one spelling for each place, and a refusal of spellings that name another place than meant."""

import re

from vectorclm.errors import StoreError

PROTOCOLS = ("file", "local", "s3", "s3a", "gs", "gcs", "az", "abfs", "memory")  # protocols of a store's address
ONE_SLASH = re.compile(rf"(?P<protocol>{'|'.join(PROTOCOLS)}):(?!//)(?P<rest>.*)", re.IGNORECASE)
REMOTE = re.compile(r"(?P<protocol>[a-z0-9+]+)://(?P<path>.*)", re.IGNORECASE)


def normalized(uri: str) -> str:
    """The one spelling of a store's address: without spaces around, and a local path without `//` and `/./`.

    Raises StoreError, naming the corrected address, for a remote address with a doubled slash, a part `.` or `..`, a
    query or a fragment, for `s3:/…`, and for characters that no address has.
    """
    uri = uri.strip(" \t\r\n")
    if any(ord(character) < 32 or ord(character) == 127 or "\ud800" <= character <= "\udfff" for character in uri):
        raise StoreError(f"store {uri!a} cannot be opened: its address has a control character or half a character")
    if "::" in uri:  # a chain of file systems, which no store is; it may hold credentials
        return uri
    if (wrong := ONE_SLASH.fullmatch(uri)) is not None:
        local = wrong["protocol"].lower() in ("file", "local")
        rest = wrong["rest"] if local else wrong["rest"].lstrip("/")
        raise StoreError(f"store {uri} cannot be opened: write {wrong['protocol'].lower()}://{rest}")
    remote = REMOTE.fullmatch(uri)
    if remote is None or remote["protocol"].lower() in ("file", "local"):
        head, path = (f"{remote['protocol']}://", remote["path"]) if remote is not None else ("", uri)
        short = re.sub(r"/(\.?/)+", "/", path)
        return head + re.sub(r"(?<=.)/\.?$", "", short)
    path = remote["path"].rstrip("/")
    if "?" in path or "#" in path:
        raise StoreError(f"store {uri} cannot be opened: write its address without ? and #")
    parts = path.split("/")
    if ".." in parts:
        raise StoreError(f"store {uri} cannot be opened: write its address without ..")
    wanted = [part for part in parts if part not in ("", ".")]
    if parts != wanted and remote["protocol"] != "memory":
        raise StoreError(f"store {uri} cannot be opened: write {remote['protocol']}://{'/'.join(wanted)}")
    return uri.rstrip("/") if path else uri
