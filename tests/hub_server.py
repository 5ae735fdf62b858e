"""A small hub: the file endpoints that the real huggingface_hub client uses, on localhost.

It answers as the hub does: a large (LFS) file redirects to a storage URL, named by its sha256, with
X-Linked-Etag and X-Linked-Size; a small one is served with its git blob hash as ETag; folders are
listed page by page with a Link header; what is absent is told by X-Error-Code. Faults can be
planted: connections dropped or slow, wrong content, ranges ignored, and whole answers of any kind.
"""

import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = hashlib.sha1(b"the only commit").hexdigest()
PAGE_ENTRIES = 3  # the hub's pages hold 1,000


class Stored(NamedTuple):
    """One file of a repository as the hub announces it, and the content it really sends."""

    content: bytes
    is_lfs: bool
    size_bytes: int
    sha256: str

    @property
    def git_oid(self) -> str:
        text = self.content
        if self.is_lfs:  # git holds a pointer to the content
            text = (f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
                    f"size {self.size_bytes}\n").encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


def stored(content: bytes, *, is_lfs=True, size_bytes=None, sha256=None) -> Stored:
    """Return a file; size_bytes and sha256 announce something else than what is sent."""
    return Stored(content, is_lfs, len(content) if size_bytes is None else size_bytes,
                  sha256 or hashlib.sha256(content).hexdigest())


class Planted(NamedTuple):
    """An answer in place of the true one; a header of None is left out."""

    status: int
    body: bytes = b""
    headers: dict = {}


class Request(NamedTuple):
    """What a client asked for; `range` is the Range header or ""."""

    method: str
    path: str
    range: str
    authorization: str


@dataclass
class Hub:
    """The server's state: repositories by name, the log of requests, and planted faults."""

    repositories: dict[str, dict[str, Stored]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    sent_bytes: int = 0  # content of files only
    drop_after_bytes: list[int] = field(default_factory=list)  # one connection each
    drop_every: int | None = None  # bytes of the answer after which each connection breaks
    pause_seconds: float = 0.0  # storage sends one byte each
    planted: list[Planted] = field(default_factory=list)  # for the next storage requests
    planted_api: list[Planted] = field(default_factory=list)  # for the next questions
    ignores_ranges: bool = False
    gate: threading.Event | None = None  # storage sends half a file, then waits for it
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""
    storage_url: str = ""  # another host: credentials must not follow there

    def downloads(self) -> list[Request]:
        """Return the requests that asked for a file's content."""
        return [r for r in self.requests if r.method == "GET" and not r.path.startswith("/api/")]


class Handler(BaseHTTPRequestHandler):
    """Routes of the hub; the server object carries the Hub."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        """Send one complete answer; header names have underscores for hyphens."""
        self.send_response(status)
        headers = {"Content_Length": len(body), **headers}
        self.close_connection = self.close_connection or headers["Content_Length"] is None
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, value, **headers):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def refuse(self, status, code, text):
        self.answer(status, json.dumps({"error": text}).encode(), X_Error_Code=code,
                    X_Error_Message=text, Content_Type="application/json")

    def handle_any(self):
        url = urlsplit(self.path)
        with self.hub.lock:
            self.hub.requests.append(Request(
                self.command, unquote(url.path), self.headers.get("Range", ""),
                self.headers.get("Authorization", "")))
        length = int(self.headers.get("Content-Length") or 0)
        body, path = self.rfile.read(length), unquote(url.path)
        match = re.fullmatch(r"/storage/([0-9a-f]{64})", path)
        with self.hub.lock:
            planted = self.hub.planted if match else self.hub.planted_api
            found = planted.pop(0) if planted else None
        if found:
            return self.answer(found.status, found.body, **found.headers)
        if match:
            return self.send_stored(match[1])
        for pattern, route in (
                (r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", self.list_folder),
                (r"/api/datasets/([^/]+/[^/]+)/paths-info/([^/]+)()", self.describe_paths),
                (r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?()", self.describe_repository),
                (r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve)):
            if match := re.fullmatch(pattern, path):
                repository, revision, rest = match[1], match[2] or "main", match[3] or ""
                if repository not in self.hub.repositories:
                    return self.refuse(401, "RepoNotFound", "Repository not found")
                if revision not in ("main", COMMIT):
                    return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                files = self.hub.repositories[repository]
                return route(repository, files, rest, parse_qs(url.query), body)
        return self.answer(404)

    do_GET = do_HEAD = do_POST = handle_any

    def describe_repository(self, repository, files, rest, query, body):
        self.answer_json({"id": repository, "sha": COMMIT, "private": False, "gated": False,
                          "disabled": False, "tags": [], "downloads": 0, "likes": 0,
                          "siblings": [{"rfilename": path} for path in sorted(files)]})

    def entry(self, path, file):
        found = {"type": "file", "path": path, "oid": file.git_oid, "size": file.size_bytes}
        if file.is_lfs:
            found["lfs"] = {"oid": file.sha256, "size": file.size_bytes, "pointerSize": 134}
        return found

    def list_folder(self, repository, files, folder, query, body):
        inside = {path: file for path, file in files.items()
                  if not folder or path.startswith(folder + "/")}
        if not inside:
            return self.refuse(404, "EntryNotFound", f"{folder} does not exist on \"main\"")
        entries = {}
        for path, file in sorted(inside.items()):
            below = path.removeprefix(folder).lstrip("/").split("/")
            if len(below) == 1 or query.get("recursive", [""])[0].lower() in ("true", "1"):
                entries[path] = self.entry(path, file)
            else:
                name = f"{folder}/{below[0]}".lstrip("/")
                entries[name] = {"type": "directory", "path": name, "size": 0,
                                 "oid": hashlib.sha1(name.encode()).hexdigest()}
        start = int(query.get("cursor", ["0"])[0])
        page, headers = list(entries.values())[start:start + PAGE_ENTRIES], {}
        if start + PAGE_ENTRIES < len(entries):
            address = f"{self.hub.url}{urlsplit(self.path).path}"
            headers["Link"] = f'<{address}?cursor={start + PAGE_ENTRIES}>; rel="next"'
        return self.answer_json(page, **headers)

    def describe_paths(self, repository, files, rest, query, body):
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(body)["paths"] if is_json else parse_qs(body.decode())["paths"]
        self.answer_json([self.entry(path, files[path]) for path in asked if path in files])

    def resolve(self, repository, files, path, query, body):
        if path not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        file = files[path]
        if not file.is_lfs:
            return self.answer(200, file.content, X_Repo_Commit=COMMIT, ETag=f'"{file.git_oid}"',
                               Accept_Ranges="bytes")
        return self.answer(
            302, b"Found. Redirecting", Location=f"{self.hub.storage_url}/storage/{file.sha256}",
            X_Repo_Commit=COMMIT, X_Linked_Etag=f'"{file.sha256}"', ETag=f'"{file.git_oid}"',
            X_Linked_Size=file.size_bytes, Accept_Ranges="bytes")

    def send_stored(self, sha256):
        with self.hub.lock:
            drop = self.hub.drop_after_bytes.pop(0) if self.hub.drop_after_bytes else (
                self.hub.drop_every)
        content = next(file.content for files in self.hub.repositories.values()
                       for file in files.values() if file.sha256 == sha256)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers, status = {}, 200
        if asked and not self.hub.ignores_ranges:
            first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            if first >= len(content):
                return self.answer(416, Content_Range=f"bytes */{len(content)}")
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first:last + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.hub.gate is not None:
            self.push(content[:len(content) // 2])
            self.hub.gate.wait(30)
            return self.push(content[len(content) // 2:])
        while self.hub.pause_seconds and content:
            self.push(content[:1])
            content = content[1:]
            time.sleep(self.hub.pause_seconds)
        self.push(content if drop is None else content[:drop])
        self.close_connection = self.close_connection or drop is not None
        return None

    def push(self, content):
        with self.hub.lock:
            self.hub.sent_bytes += len(content)
        self.wfile.write(content)
        self.wfile.flush()


class Server(ThreadingHTTPServer):
    """Prints no traceback when a client hangs up, which clients that fail here do."""

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def start(hub: Hub) -> Server:
    """Serve `hub` on a free port of localhost until shutdown(); sets hub.url."""
    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.hub = True, hub
    port = server.server_address[1]
    hub.url, hub.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02},
                     daemon=True).start()
    return server
