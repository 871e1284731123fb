"""A cache of the manifests of a remote store in the user's cache folder: listing a store fetches each manifest once.

A manifest is known by its key and its state in the store's listing, which has a hash of its bytes on S3. The cache is
optional: where the cache folder cannot be read or written, manifests are fetched again.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from vectorclm.store.durable import temporary_file
from vectorclm.store.hash_memory import State, cache_folder


class ManifestMemory:
    """The remembered manifests of the store at an address, by the keys of their folders."""

    def __init__(self, uri: str) -> None:
        self._path = Path(cache_folder(), "manifests", f"{hashlib.sha256(uri.encode()).hexdigest()}.json")
        self._entries: dict[str, tuple[State, Mapping[str, Any]]] = {}
        self._changed = False
        with suppress(OSError, ValueError, AttributeError, TypeError):
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            self._entries = {key: (state, dict(manifest)) for key, (state, manifest) in kept.items()}

    def known(self, key: str, state: State) -> bytes | None:
        """The manifest of a folder in this state of its file, as JSON; None where it is not known."""
        seen, manifest = self._entries.get(key, (None, None))
        return json.dumps(manifest).encode() if state and seen == list(state) else None

    def remember(self, key: str, state: State, manifest: Mapping[str, Any]) -> None:
        """Remember a manifest in this process; `save` makes it permanent."""
        self._entries[key] = (list(state), manifest)
        self._changed = True

    def save(self, keys: Collection[str]) -> None:
        """Write the manifests of these folders to the cache folder, where that is possible, if any is new or gone."""
        gone = self._entries.keys() - set(keys)
        if self._changed or gone:
            left = {key: entry for key, entry in self._entries.items() if key not in gone}
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with temporary_file(self._path) as part:
                    part.write_text(json.dumps(left), encoding="utf-8")
                    part.replace(self._path)
