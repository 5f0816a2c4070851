"""A stand-in for the Hugging Face Hub on 127.0.0.1: serves folders as dataset repositories, with injected faults.

    with serve({"owner/name": {"main": folder}}) as hub:
        huggingface_hub.HfApi(endpoint=hub.endpoint).dataset_info("owner/name")
        hub.faults.append(Fault("/cdn/*/00.jsonl.zst", cut_after=1000))

It serves what `huggingface_hub` and `datasets` request: a repository's info, its tree, path information, and files. As
on the Hub, a large file (here: any whose suffix is not in `REGULAR`) is a redirect from `/datasets/REPO/resolve/...` to
another address, here `/cdn/REPO/...`, and the Hub states its SHA-256; a regular one comes directly, under its git hash.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

REGULAR = (".md", ".json", ".yaml", ".gitattributes")
Answer = tuple[int, dict[str, str], bytes]  # status, headers, body

Repos = dict[str, dict[str, Path]]  # folder by branch or tag, by repository


@dataclass
class Fault:
    """Fault of requests for a path.

    Args:
        path: pattern of the URL's path, `fnmatch` style.
        times: how many requests it happens to.
        method: pattern of the request's method.
        status: to answer with, instead of serving.
        error: the Hub's `X-Error-Code`, e.g. RepoNotFound, GatedRepo, RevisionNotFound, EntryNotFound.
        cut_after: bytes of the body after which the connection closes.
        reset: have it close as if the machine behind it had gone.
        flip_at: byte of the body that is wrong.
        no_range: serve the full file to a request for a part.
    """

    path: str
    times: int = 1
    method: str = "GET"
    status: int = 200
    error: str = ""
    cut_after: int | None = None
    reset: bool = False
    flip_at: int | None = None
    no_range: bool = False


class Request(NamedTuple):
    """One received request."""

    method: str
    path: str
    range: str | None
    token: str | None = None  # its `Authorization`


@dataclass
class Hub:
    """Served repositories, faults and received requests; all may change while the Hub runs."""

    repos: Repos
    endpoint: str = ""
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def commit(self, repo: str, revision: str = "main") -> str:
        """Return the commit hash of a branch, which depends only on the content of its folder."""
        content = {path: hashlib.sha256(file.read_bytes()).hexdigest() for path, file in self.files(repo, revision)}
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def files(self, repo: str, revision: str) -> Iterator[tuple[str, Path]]:
        """Return the path in the repository and on disk of every file."""
        folder = self.repos[repo][revision]
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                yield file.relative_to(folder).as_posix(), file

    def branch(self, repo: str, revision: str) -> str | None:
        """Return the branch with this name or commit hash."""
        return next((name for name in self.repos[repo] if revision in (name, self.commit(repo, name))), None)

    def downloads(self, path: str) -> list[str | None]:
        """Return the `Range` of each request for a large file's content, in order."""
        return [
            each.range for each in self.requests if each.method == "GET" and fnmatchcase(each.path, f"/cdn/*/{path}")
        ]

    def take_fault(self, request: Request) -> Fault:
        """Return the fault for a request and reduce its count; if there is none, return one without effect."""
        for fault in self.faults:
            if fault.times > 0 and fnmatchcase(request.path, fault.path) and fnmatchcase(request.method, fault.method):
                fault.times -= 1
                return fault
        return Fault(request.path)


@contextmanager
def serve(repos: Repos) -> Iterator[Hub]:
    """Run a Hub with these repositories until the end of the block."""
    hub = Hub(repos)

    class Handler(_Handler):
        served = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: Hub

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        request = Request(self.command, path, self.headers.get("Range"), self.headers.get("Authorization"))
        self.served.requests.append(request)
        fault = self.served.take_fault(request)
        if fault.status != 200:
            self._send(_error(fault.status, fault.error), fault)
            return
        if fault.no_range:
            del self.headers["Range"]
        self._send(self._answer(path), fault)

    do_HEAD = do_POST = do_GET

    def _answer(self, path: str) -> Answer:
        for pattern, serve_it in _ROUTES:
            if match := re.fullmatch(pattern, path):
                named = {name: unquote(value) for name, value in match.groupdict("").items()}
                return self._in_repo(serve_it, **named)
        return _error(404, "")

    def _in_repo(self, serve_it: Callable[..., Answer], repo: str, revision: str, path: str = "") -> Answer:
        if repo not in self.served.repos:
            return _error(404, "RepoNotFound")
        branch = self.served.branch(repo, revision or "main")
        if branch is None:
            return _error(404, "RevisionNotFound")
        files = dict(self.served.files(repo, branch))
        return serve_it(self, _Asked(repo, self.served.commit(repo, branch), path, files))

    def _send(self, answer: Answer, fault: Fault) -> None:
        status, headers, body = answer
        if fault.flip_at is not None:
            body = body[: fault.flip_at] + bytes([body[fault.flip_at] ^ 1]) + body[fault.flip_at + 1 :]
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # the client has closed the connection
                self.wfile.write(body[: fault.cut_after])
        if fault.reset:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *parts: object) -> None:
        """Say nothing."""


class _Asked(NamedTuple):
    """Repository, revision and path of a request."""

    repo: str
    commit: str
    path: str
    files: dict[str, Path]


def _info(handler: _Handler, asked: _Asked) -> Answer:
    siblings = [{"rfilename": path} for path in asked.files]
    return _json({"id": asked.repo, "sha": asked.commit, "tags": ["license:mit"], "siblings": siblings})


def _tree(handler: _Handler, asked: _Asked) -> Answer:
    recursive = parse_qs(urlsplit(handler.path).query).get("recursive", ["false"])[0].lower() == "true"
    inside = f"{asked.path}/" if asked.path else ""
    below = [path for path in asked.files if path.startswith(inside)]
    if asked.path and not below:
        return _error(404, "EntryNotFound")
    folders = {path[: cut.start()] for path in below for cut in re.finditer("/", path) if cut.start() >= len(inside)}
    entries = [_entry(path, asked.files) for path in sorted({*below, *folders})]
    return _json([entry for entry in entries if recursive or "/" not in entry["path"][len(inside) :]])


def _paths_info(handler: _Handler, asked: _Asked) -> Answer:
    form = parse_qs(handler.rfile.read(int(handler.headers["Content-Length"])).decode())
    folders = {parent.as_posix() for path in asked.files for parent in Path(path).parents}
    return _json([_entry(path, asked.files) for path in form.get("paths", []) if path in {*asked.files, *folders}])


def _resolve(handler: _Handler, asked: _Asked) -> Answer:
    if asked.path not in asked.files or not _is_large(asked.path):
        return _content(handler, asked)
    _, headers, _ = _content(handler, asked)
    url = f"{handler.served.endpoint}/cdn/{asked.repo}/{asked.commit}/{asked.path}"
    return 302, headers | {"Content-Length": "0", "Location": url}, b""


def _content(handler: _Handler, asked: _Asked) -> Answer:
    if asked.path not in asked.files:
        return _error(404, "EntryNotFound")
    body = asked.files[asked.path].read_bytes()
    entry = _entry(asked.path, asked.files)
    etag = entry["lfs"]["oid"] if _is_large(asked.path) else entry["oid"]
    headers = {"X-Repo-Commit": asked.commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
    if _is_large(asked.path):
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(body))}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
    if wanted is None:
        return 200, headers, body
    first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
    if first > last:
        return 416, headers | {"Content-Range": f"bytes */{len(body)}"}, b""
    return 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(body)}"}, body[first : last + 1]


def _is_large(path: str) -> bool:
    return not path.endswith(REGULAR)


def _entry(path: str, files: dict[str, Path]) -> dict[str, Any]:
    """Return the Hub's description of a path in a tree."""
    if path not in files:
        return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
    body = files[path].read_bytes()
    entry = {"type": "file", "path": path, "size": len(body), "oid": hashlib.sha1(_blob(body)).hexdigest()}
    if _is_large(path):
        entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
    return entry


def _blob(body: bytes) -> bytes:
    """Return the git hash of a file."""
    return b"blob %d\0" % len(body) + body


def _json(content: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(status: int, code: str) -> Answer:
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b""


_ROUTES: tuple[tuple[str, Callable[..., Answer]], ...] = (
    (r"/api/datasets/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?", _info),
    (r"/api/datasets/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _tree),
    (r"/api/datasets/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", _paths_info),
    (r"/datasets/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
    (r"/cdn/(?P<repo>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<path>.+)", _content),
)
