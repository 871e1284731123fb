"""A small Hugging Face hub: the routes that `datasets` and `huggingface_hub` call, on a free port.

Repositories are folders in memory with a history of commits. Large files are answered as the hub does it,
with a redirect to where their bytes lie. Every request is kept in `Hub.requests`.
"""

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

Files = dict[str, bytes]

API = re.compile(r"/api/datasets/(?P<repo>[^/]+/[^/]+)(?:/(?P<verb>revision|tree|paths-info)/(?P<rest>.+))?")
RESOLVE = re.compile(r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class Hub:
    """`with Hub() as hub: hub.push("owner/name", {"README.md": b"…"})`; `hub.url` is its HF_ENDPOINT."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}
        self.heads: dict[str, str] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def __enter__(self) -> Self:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    def push(self, repo: str, files: Mapping[str, bytes]) -> str:
        """A new commit, the head from now on, with exactly these files; its hash."""
        history = self.commits.setdefault(repo, {})
        content = "".join(f"{name} {hashlib.sha1(data).hexdigest()}\n" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{len(history)} {content}".encode()).hexdigest()
        history[commit] = dict(files)
        self.heads[repo] = commit
        return commit

    def remove(self, repo: str, commit: str) -> None:
        """Forget a commit, as a forced push does."""
        del self.commits[repo][commit]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are kept, not printed."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.do_GET()

    def do_GET(self) -> None:
        """Find the route, the repository and the commit; what is not there is told as the hub tells it."""
        self.hub.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/cdn/"):
            return self._bytes(path.removeprefix("/cdn/"))
        found = API.fullmatch(path) or RESOLVE.fullmatch(path)
        if found is None:
            return self._missing("", f"no route {path}")
        parts = found.groupdict()
        if (history := self.hub.commits.get(parts["repo"])) is None:
            return self._missing("RepoNotFound", "Repository not found", status=401)
        verb, rest = (
            parts.get("verb") or ("resolve" if "path" in parts else "revision"),
            parts.get("rest") or "main",
        )
        revision, _, below = rest.partition("/") if "rest" in parts else (parts["revision"], "", parts["path"])
        commit = self.hub.heads[parts["repo"]] if revision == "main" else revision
        if commit not in history:
            return self._missing("RevisionNotFound", f"Invalid rev id: {revision}")
        files = history[commit]
        if verb == "revision":
            return self._json({"id": parts["repo"], "sha": commit, "siblings": [{"rfilename": n} for n in files]})
        if verb == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["False"])[0].lower() == "true"
            entries = _tree(files, below, recursive)
            return self._json(entries) if entries or not below else self._missing("EntryNotFound", "no such folder")
        if verb == "paths-info":
            known = {entry["path"]: entry for entry in _tree(files, "", recursive=True)}
            return self._json([known[name] for name in self.form["paths"] if name in known])
        return self._resolve(files.get(below), commit)

    def _resolve(self, data: bytes | None, commit: str) -> None:
        if data is None:
            return self._missing("EntryNotFound", "Entry not found", commit)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if data.startswith(b"PAR1"):
            sha256 = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{sha256}"'}
            return self._answer(302, b"", {**headers, **linked, "Location": f"{self.hub.url}/cdn/{sha256}"})
        return self._answer(200, data, headers)

    def _bytes(self, sha256: str) -> None:
        blobs = (data for commits in self.hub.commits.values() for files in commits.values() for data in files.values())
        data = next(data for data in blobs if hashlib.sha256(data).hexdigest() == sha256)
        if (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) is None:
            return self._answer(200, data, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        return self._answer(
            206,
            data[first : last + 1],
            {"ETag": f'"{sha256}"', "Content-Range": f"bytes {first}-{last}/{len(data)}"},
        )

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _missing(self, code: str, message: str, commit: str = "", status: int = 404) -> None:
        headers = {
            "X-Error-Code": code,
            "X-Error-Message": message,
            **({"X-Repo-Commit": commit} if commit else {}),
        }
        self._answer(status, json.dumps({"error": message}).encode(), headers)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tree(files: Files, below: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder, as the hub's tree route lists them."""
    prefix = f"{below.strip('/')}/" if below.strip("/") else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, data in sorted(files.items()):
        if not name.startswith(prefix):
            continue
        folders = name.removeprefix(prefix).split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            if recursive or depth == 1:
                path = prefix + "/".join(folders[:depth])
                entries[path] = {
                    "type": "directory",
                    "oid": hashlib.sha1(path.encode()).hexdigest(),
                    "size": 0,
                    "path": path,
                }
        if recursive or not folders:
            entry = {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
            if data.startswith(b"PAR1"):
                entry["lfs"] = {
                    "oid": hashlib.sha256(data).hexdigest(),
                    "size": len(data),
                    "pointerSize": 134,
                }
            entries[name] = entry
    return list(entries.values())
