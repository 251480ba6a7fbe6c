"""The Hub's protocol on loopback, as huggingface_hub speaks it: directories served as model repositories.

    python -m scripts.fakehub.server bloomdesk/miniature=DIRECTORY [NAME=DIRECTORY ...] [--port N] [--minutes M]
        [--rate MB] [--faults SEED [--share P] [--longest-stall S]]

prints the address for HF_ENDPOINT on its first line. It serves 127.0.0.1 only, and stops after the minutes, when the
process that started it ends, or when a pipe that is its standard input closes. `--rate` limits each connection, in
MB/s; with `--faults`, a share of all answers is dropped, stalled, refused or changed.

For tests, `with LocalHub({"some/name": directory}) as hub` gives `hub.endpoint`, every request in `hub.requests`, and
`hub.fail`, which sets faults for a path. Large files come from a second port, as from a CDN.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import stat
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, quote, unquote, urlsplit

from scripts.fakehub.faults import Fault, RandomFaults
from scripts.fakehub.shelf import Entry, Repo, Shelf

BUFFER_BYTES = 2**18
# With a limited rate, a buffer holds the bytes of this time, so that they flow evenly.
SECONDS_OF_BUFFER = 0.02
# A connection may make up for a late wake-up of this many seconds.
LATENESS = 0.05
NAME = r"([^/]+(?:/[^/]+)?)"
# By server: the patterns of its addresses and the handler's methods that answer them.
ROUTES = {
    "cdn": {r"/store/(.+)/([0-9a-f]{40})/(.+)": "_store"},
    "hub": {
        rf"/api/models/{NAME}/tree/(.+)": "_tree",
        rf"/api/models/{NAME}/revision/(.+)": "_info",
        rf"/api/models/{NAME}": "_info",
        rf"/{NAME}/resolve/([^/]+)/(.+)": "_resolve",
    },
}


@dataclass(frozen=True)
class Request:
    """A request as it came: `server` is "hub" or "cdn", `path` is unquoted and without the query."""

    server: str
    method: str
    path: str
    headers: Mapping[str, str]


class LocalHub:
    """Serves repositories by name until it is closed; a directory without more is a public repository."""

    def __init__(
        self,
        repos: Mapping[str, Repo | Path],
        *,
        port: int = 0,
        page_size: int = 1000,
        rate: float | None = None,
        faults: RandomFaults | None = None,
    ) -> None:
        """`rate` limits each connection, in bytes a second; `faults` apply to requests without another fault."""
        self.rate, self.random_faults = rate, faults
        self.repos = {n: repo if isinstance(repo, Repo) else Repo(Path(repo)) for n, repo in repos.items()}
        self.page_size = page_size
        self.shelf = Shelf()
        self.requests: list[Request] = []
        # By a file's path in its repository, or by an API path from /api on.
        self.faults: dict[str, list[Fault]] = {}
        self.closing = threading.Event()
        # While this is set, every connection ends without an answer.
        self.is_gone = False
        self._lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", port), self, "hub"), _Server(("127.0.0.1", 0), self, "cdn")]
        self._threads = [threading.Thread(target=s.serve_forever, args=(0.02,)) for s in self._servers]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def store(self) -> str:
        """The address from which large files come."""
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def __enter__(self) -> LocalHub:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop at once, also while clients wait; may be called twice, and before the start."""
        self.closing.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            # Without a thread, shutdown would wait forever.
            if thread.ident is not None:
                server.shutdown()
                server.hang_up()
                thread.join()
            server.server_close()

    def go(self) -> None:
        """Be gone, as behind a router that restarts: connections end, and new ones get no answer."""
        self.is_gone = True
        for server in self._servers:
            server.hang_up()

    def come_back(self) -> None:
        self.is_gone = False

    def fail(self, path: str, *faults: Fault) -> None:
        """Apply these faults to requests for `path`, each until it has been used up."""
        self.faults.setdefault(path, []).extend(faults)

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def fault(self, path: str, method: str, start: int = 0, stop: int = 0) -> Fault:
        """The fault for a request for these bytes; one without effect if there is none."""
        with self._lock:
            for fault in self.faults.get(path, ()):
                if fault.method == method and fault.times != 0 and fault.since <= start:
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        if self.random_faults is None:
            return Fault()
        return self.random_faults.draw(start, stop, body=method == "GET" and stop > start)

    def asked(self, method: str, ending: str) -> list[Request]:
        """The requests of a method for paths with this ending, in the order of arrival."""
        with self._lock:
            return [each for each in self.requests if each.method == method and each.path.endswith(ending)]


class _Server(ThreadingHTTPServer):
    # Closing waits for all threads.
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], hub: LocalHub, name: str) -> None:
        self.hub, self.name = hub, name
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def verify_request(self, request, client_address) -> bool:
        return not self.hub.is_gone

    def process_request(self, request, client_address) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """End the connections that clients keep open."""
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address) -> None:
        # Killed clients are expected.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Refusal(Exception):
    """An error as the answer; without `headers` they give the message too, as the Hub does."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        named = {"X-Error-Code": code} if code else {}
        named |= {"X-Error-Message": message} if headers is None else headers
        self.answer = status, {"error": message}, named


class _Intruder(Exception):
    """Somebody else answers, as the fault says."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    _free_at = 0.0

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.hub.is_gone:
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        self._hub, self._path = self.server.hub, unquote(parts.path)
        self._query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._hub.note(Request(self.server.name, self.command, self._path, headers))
        try:
            for pattern, answer in ROUTES[self.server.name].items():
                if match := re.fullmatch(pattern, self._path):
                    return getattr(self, answer)(*match.groups())
            raise _Refusal(404, "", "no such address")
        except _Refusal as refusal:
            self._send(*refusal.answer)
        except _Intruder as intruder:
            self._intrude(intruder.fault)

    do_HEAD = do_GET

    def _repo(self, name: str, revision: str, *, content: bool) -> tuple[Repo, str]:
        """The repository and the commit that `revision` means, if the caller may see them."""
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repo = self._hub.repos.get(name)
        if repo is None or (repo.token and not repo.gated and sent != repo.token):
            # The Hub does not say which of the two it is.
            raise _Refusal(404 if sent else 401, "RepoNotFound", "Repository not found")
        if content and repo.gated and sent != repo.token:
            message = f"Access to model {name} is restricted. You must be authenticated and on the list."
            raise _Refusal(403 if sent else 401, "GatedRepo", message)
        commit = self._hub.shelf.commit(repo)
        if revision not in repo.branches and not (len(revision) >= 7 and commit.startswith(revision)):
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def _info(self, name: str, revision: str = "main") -> None:
        self._fault(self._path)
        repo, commit = self._repo(name, revision, content=False)
        siblings = [{"rfilename": path} for path in self._hub.shelf.entries(repo)]
        body = {"id": name, "modelId": name, "sha": commit, "private": bool(repo.token), "siblings": siblings}
        self._send(200, body, {"X-Repo-Commit": commit})

    def _tree(self, name: str, revision: str) -> None:
        fault = self._fault(self._path)
        repo, commit = self._repo(name, revision, content=False)
        entries = [entry.as_json() for entry in self._hub.shelf.entries(repo).values()]
        if self._query.get("recursive", "").lower() not in ("true", "1"):
            folders = {entry["path"].partition("/")[0] for entry in entries if "/" in entry["path"]}
            entries = [entry for entry in entries if "/" not in entry["path"]]
            folder = {"type": "directory", "oid": "0" * 40, "size": 0}
            entries += [{**folder, "path": path} for path in sorted(folders)]
        start = int(self._query.get("cursor", "0"))
        page = entries[start : start + self._hub.page_size]
        headers = {"X-Repo-Commit": commit}
        if start + len(page) < len(entries):
            flags = f"recursive={self._query.get('recursive', 'false')}&expand=false"
            where = f"{self._hub.endpoint}/api/models/{quote(name)}/tree/{quote(revision, safe='')}"
            headers["Link"] = f'<{where}?{flags}&cursor={start + len(page)}>; rel="next"'
        self._send(200, page, {**headers, **fault.headers})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo, commit = self._repo(name, revision, content=True)
        entry = self._hub.shelf.entries(repo).get(path)
        if entry is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        # Others are redirected to the store, where the fault applies.
        here = self.command == "HEAD" or not entry.large
        fault = self._fault(path, entry.size) if here else Fault()
        etag, size = fault.etag or entry.etag, entry.size if fault.announce is None else fault.announce
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if not entry.large:
            headers["Content-Type"] = "text/plain"
            if self.command == "HEAD":
                return self._send_headers(200, size, headers)
            return self._send_file(repo.directory / path, entry, fault, headers)
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size)}
        store = f"{self._hub.store}/store/{quote(name)}/{commit}/{quote(path)}?signature=valid"
        self._send(302, None, headers | {"Location": fault.location or store})

    def _store(self, name: str, commit: str, path: str) -> None:
        """Large files, for any caller with the signed address; no token is needed."""
        repo = self._hub.repos.get(name)
        entry = self._hub.shelf.entries(repo).get(path) if repo is not None else None
        if entry is None or self._query.get("signature") != "valid":
            raise _Refusal(403, "", "no valid signature")
        headers = {"ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
        self._send_file(repo.directory / path, entry, self._fault(path, entry.size), headers)

    def _fault(self, path: str, size: int = 0) -> Fault:
        """The fault for this request; raises `_Refusal` if it refuses the request."""
        fault = self._hub.fault(path, self.command, *self._wanted(size)[:2])
        if fault.stall and fault.drop_after is None:
            self._hub.closing.wait(fault.stall)
        if fault.status is not None:
            raise _Refusal(fault.status, fault.code, "by a fault", fault.headers)
        if fault.page is not None or fault.trickle:
            raise _Intruder(fault)
        return fault

    def _intrude(self, fault: Fault) -> None:
        """Answer as a proxy does that sends a page of its own, or a server that sends header bytes without an end."""
        self.close_connection = True
        if fault.trickle:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Filler: ")
            while not self._hub.closing.wait(fault.trickle):
                self.wfile.write(b"x")
            return
        page = fault.page or b""
        self.send_response(200)
        self.send_header("Content-Type", fault.kind)
        if fault.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            page = b"%x\r\n%b\r\n0\r\n\r\n" % (len(page), page)
        else:
            self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(page)

    def _wanted(self, size: int) -> tuple[int, int, int]:
        """The range of bytes that the request asks for, and the status of the answer."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 0, size, 200
        return int(wanted[1]), min(size, int(wanted[2] or size - 1) + 1), 206

    def _send_file(self, path: Path, entry: Entry, fault: Fault, headers: dict[str, str]) -> None:
        size = entry.size if fault.size is None else fault.size
        start, stop, status = self._wanted(size)
        if fault.ignore_range or self.headers.get("If-Range", "").strip('"') not in ("", entry.etag):
            start, stop, status = 0, size, 200
        if status == 206:
            if start >= size:
                return self._send(416, None, {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send_headers(status, stop - start, headers)
        if self.command == "HEAD":
            return
        length = BUFFER_BYTES
        if self._hub.rate is not None:
            length = max(1, min(length, int(self._hub.rate * SECONDS_OF_BUFFER)))
        elif fault.spares_body:
            length = max(1, stop - start)
        with path.open("rb") as file:
            end = stop if fault.drop_after is None else min(stop, start + fault.drop_after)
            for position in range(start, end, length):
                count = min(length, end - position)
                self._pace(count)
                if fault.spares_body:
                    # Without a copy, so that this hub does not limit a client's speed.
                    self.connection.sendfile(file, position, count)
                else:
                    self.wfile.write(_buffer(file, position, count, fault))
        if fault.drop_after is not None and end == start + fault.drop_after:
            self._drop(fault)

    def _pace(self, count: int) -> None:
        """Wait until this connection may send `count` more bytes."""
        if self._hub.rate is not None:
            now = time.monotonic()
            # Unused bytes of idle time expire, except those of a late wake-up.
            self._free_at = max(self._free_at, now - LATENESS) + count / self._hub.rate
            self._hub.closing.wait(max(0.0, self._free_at - now))

    def _drop(self, fault: Fault) -> None:
        self._hub.closing.wait(fault.stall)
        self.close_connection = True
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, body: Any, headers: Mapping[str, str]) -> None:
        """Send a body as JSON, or none."""
        data = b"" if body is None else json.dumps(body).encode()
        self._send_headers(status, len(data), headers)
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_headers(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", **headers, "Content-Length": str(length)}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _buffer(file: BinaryIO, position: int, count: int, fault: Fault) -> bytearray:
    """The file's bytes from `position`, with zeros after its end, and with the fault's changed byte."""
    file.seek(position)
    buffer = bytearray(file.read(count).ljust(count, b"\0"))
    if fault.flip is not None and position <= fault.flip < position + count:
        buffer[fault.flip - position] ^= 1
    return buffer


def _wait(minutes: float, parent: int, ended: threading.Event) -> None:
    """Wait until the time is over, `ended` is set, or the process that started this has ended."""
    if stat.S_ISFIFO(os.fstat(0).st_mode) or stat.S_ISSOCK(os.fstat(0).st_mode):
        # A terminal or /dev/null says nothing about the other end; a pipe does.
        def watch() -> None:
            while os.read(0, 4096):
                pass
            ended.set()

        threading.Thread(target=watch, daemon=True).start()
    last = time.monotonic() + 60 * minutes
    while not ended.wait(0.2) and time.monotonic() < last and os.getppid() == parent:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve directories as a Hub on 127.0.0.1.")
    parser.add_argument("repos", nargs="+", metavar="NAME=DIRECTORY")
    parser.add_argument("--port", type=int, default=0, help="default: any free one")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after this time (default: 30)")
    parser.add_argument("--rate", type=float, metavar="MB", help="limit of each connection, in MB/s")
    parser.add_argument("--faults", type=int, metavar="SEED", help="apply random faults to answers")
    parser.add_argument("--share", type=float, default=0.1, help="of the answers with a fault (default: 0.1)")
    parser.add_argument("--longest-stall", type=float, default=2.0, metavar="S", help="seconds (default: 2)")
    options, parent, repos = parser.parse_args(), os.getppid(), {}
    for given in options.repos:
        name, _, directory = given.partition("=")
        if not name or not Path(directory).is_dir() or not directory:
            parser.error(f"{given!r} is not NAME=DIRECTORY with a directory that exists")
        repos[name] = Path(directory)
    seed, rate = options.faults, options.rate * 1e6 if options.rate else None
    faults = None if seed is None else RandomFaults(seed, options.share, options.longest_stall)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with LocalHub(repos, port=options.port, rate=rate, faults=faults) as hub:
        for repo in hub.repos.values():
            # Hashed now, so that no client waits for it.
            hub.shelf.entries(repo)
        print(hub.endpoint, flush=True)
        _wait(options.minutes, parent, ended)
    return 0


if __name__ == "__main__":
    sys.exit(main())
