"""The Hub's protocol on loopback, as huggingface_hub speaks it: directories served as model repositories.

    python -m scripts.fakehub.server bloomdesk/miniature=DIRECTORY [NAME=DIRECTORY ...] [--port N] [--minutes M]
        [--rate MB] [--faults SEED [--share P] [--longest-stall S]]

prints the address for HF_ENDPOINT on its first line. It serves 127.0.0.1 only, and stops by itself: after the
minutes, when the process that started it ends, or when a pipe that is its standard input closes. `--rate`
limits each connection, in MB/s; `--faults` lets a share of all answers drop, stall, refuse or change.

For tests, `with LocalHub({"some/name": directory}) as hub` gives `hub.endpoint`, every request in
`hub.requests`, and `hub.fail`, which lets requests for a path fail in chosen ways. Large files come from a
second port, as from a CDN.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from scripts.fakehub.faults import Fault, RandomFaults
from scripts.fakehub.shelf import Entry, Repo, Shelf

PIECE = 2**18
SECONDS_OF_PIECE = 0.02
LATENESS = 0.05


@dataclass(frozen=True)
class Request:
    """A request as it came: `server` is "hub" or "cdn", `path` is unquoted and without the query."""

    server: str
    method: str
    path: str
    headers: Mapping[str, str]


class LocalHub:
    """Serves repositories by name until it is closed; a directory alone means an open repository."""

    def __init__(
        self,
        repos: Mapping[str, Repo | Path],
        *,
        port: int = 0,
        page_size: int = 1000,
        rate: float | None = None,
        faults: RandomFaults | None = None,
    ) -> None:
        """`rate` limits each connection, in bytes a second; `faults` befall what no other fault does."""
        self.rate, self.random_faults = rate, faults
        self.repos = {
            name: repo if isinstance(repo, Repo) else Repo(Path(repo)) for name, repo in repos.items()
        }
        self.page_size = page_size
        self.shelf = Shelf()
        self.requests: list[Request] = []
        # By a file's path in its repository, or by an API path from /api on.
        self.faults: dict[str, list[Fault]] = {}
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._servers = [_Server(("127.0.0.1", port), self, "hub"), _Server(("127.0.0.1", 0), self, "cdn")]
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(0.02,)) for server in self._servers
        ]

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
        """Stop at once, whatever clients are waiting for; again is allowed, and without having begun."""
        self.closing.set()
        for server, thread in zip(self._servers, self._threads, strict=True):
            if thread.ident is not None:  # otherwise shutdown would wait forever
                server.shutdown()
                server.hang_up()
                thread.join()
            server.server_close()

    def fail(self, path: str, *faults: Fault) -> None:
        """Let requests for `path` meet these faults, one after another as each has been used up."""
        self.faults.setdefault(path, []).extend(faults)

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def fault(self, path: str, method: str, start: int = 0, stop: int = 0) -> Fault:
        """The fault that a request for these bytes meets; one without any effect if there is none."""
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
    daemon_threads = False  # so that closing waits for all of them
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], hub: LocalHub, name: str) -> None:
        self.hub, self.name = hub, name
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

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
        if not isinstance(sys.exc_info()[1], OSError):  # clients that are killed are what this hub is for
            super().handle_error(request, client_address)


class _Refusal(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    _free_at = 0.0

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self._hub, path = self.server.hub, unquote(parts.path)
        self._query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._hub.note(Request(self.server.name, self.command, path, headers))
        try:
            for pattern, answer in self._routes():
                match = pattern.fullmatch(path)
                if match:
                    return answer(*match.groups())
            raise _Refusal(404, "", "no such address")
        except _Refusal as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send(refusal.status, json.dumps({"error": refusal.message}).encode(), headers)

    def _routes(self) -> list[tuple[re.Pattern[str], Callable]]:
        if self.server.name == "cdn":
            return [(re.compile(r"/store/(.+)/([0-9a-f]{40})/(.+)"), self._store)]
        name = r"([^/]+(?:/[^/]+)?)"
        return [
            (re.compile(rf"/api/models/{name}/tree/(.+)"), self._tree),
            (re.compile(rf"/api/models/{name}/revision/(.+)"), self._info),
            (re.compile(rf"/api/models/{name}"), self._info),
            (re.compile(rf"/{name}/resolve/([^/]+)/(.+)"), self._resolve),
        ]

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
        known = revision in repo.branches or (len(revision) >= 7 and commit.startswith(revision))
        if not known:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit

    def _info(self, name: str, revision: str = "main") -> None:
        if self._failed(self.path.partition("?")[0]):
            return
        repo, commit = self._repo(name, revision, content=False)
        siblings = [{"rfilename": path} for path in self._hub.shelf.entries(repo)]
        body = {"id": name, "modelId": name, "sha": commit, "private": bool(repo.token), "siblings": siblings}
        self._send(200, json.dumps(body).encode(), {"X-Repo-Commit": commit})

    def _tree(self, name: str, revision: str) -> None:
        fault = self._hub.fault(unquote(self.path.partition("?")[0]), self.command)
        if self._refused(fault):
            return
        repo, commit = self._repo(name, revision, content=False)
        entries = [entry.as_json() for entry in self._hub.shelf.entries(repo).values()]
        if self._query.get("recursive", "").lower() not in ("true", "1"):
            folders = {entry["path"].partition("/")[0] for entry in entries if "/" in entry["path"]}
            entries = [entry for entry in entries if "/" not in entry["path"]]
            entries += [
                {"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)
            ]
        start = int(self._query.get("cursor", "0"))
        page = entries[start : start + self._hub.page_size]
        headers = {"X-Repo-Commit": commit}
        if start + len(page) < len(entries):
            flags = f"recursive={self._query.get('recursive', 'false')}&expand=false"
            where = f"{self._hub.endpoint}/api/models/{quote(name)}/tree/{quote(revision, safe='')}"
            headers["Link"] = f'<{where}?{flags}&cursor={start + len(page)}>; rel="next"'
        self._send(200, json.dumps(page).encode(), {**headers, **fault.headers})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo, commit = self._repo(name, revision, content=True)
        entry = self._hub.shelf.entries(repo).get(path)
        if entry is None:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        fault = Fault()
        if self.command == "HEAD" or not entry.large:
            fault = self._hub.fault(path, self.command, *self._wanted(entry.size)[:2])
            if self._refused(fault):
                return
        etag, size = fault.etag or entry.etag, entry.size if fault.announce is None else fault.announce
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if not entry.large:
            headers["Content-Type"] = "text/plain"
            if self.command == "HEAD":
                return self._send_headers(200, size, headers)
            return self._send_file(repo.directory / path, entry, fault, headers)
        headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(size)}
        store = f"{self._hub.store}/store/{quote(name)}/{commit}/{quote(path)}?signature=valid"
        headers["Location"] = fault.location or store
        self._send(302, b"", headers)

    def _store(self, name: str, commit: str, path: str) -> None:
        """Large files, for any caller with the signed address; no token is needed."""
        repo = self._hub.repos.get(name)
        entry = self._hub.shelf.entries(repo).get(path) if repo is not None else None
        if entry is None or self._query.get("signature") != "valid":
            raise _Refusal(403, "", "no valid signature")
        fault = self._hub.fault(path, self.command, *self._wanted(entry.size)[:2])
        if not self._refused(fault):
            headers = {"ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
            self._send_file(repo.directory / path, entry, fault, headers)

    def _failed(self, path: str) -> bool:
        return self._refused(self._hub.fault(unquote(path), self.command))

    def _refused(self, fault: Fault) -> bool:
        """Whether the fault has answered in place of the file."""
        if fault.stall and fault.drop_after is None:
            self._hub.closing.wait(fault.stall)
        if fault.status is None:
            return False
        code = {"X-Error-Code": fault.code} if fault.code else {}
        self._send(fault.status, b'{"error": "as the fault says"}', {**code, **fault.headers})
        return True

    def _wanted(self, size: int) -> tuple[int, int, int]:
        """The bytes that are asked for, from and to, and the status with which they come."""
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
                return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._send_headers(status, stop - start, headers)
        if self.command == "HEAD":
            return
        rate = self._hub.rate
        # With a limited rate, blocks are so small that they flow evenly.
        length = PIECE if rate is None else max(1, min(PIECE, int(rate * SECONDS_OF_PIECE)))
        if fault.spares_body:
            return self._send_as_it_is(path, start, stop, length)
        for sent, piece in _pieces(path, start, stop, fault, length):
            self._pace(len(piece))
            self.wfile.write(piece)
            if fault.drop_after is not None and sent + len(piece) >= fault.drop_after:
                return self._drop(fault)

    def _send_as_it_is(self, path: Path, start: int, stop: int, length: int) -> None:
        """From the file to the socket without a copy, so that this hub is no client's limit."""
        with path.open("rb") as file:
            if self._hub.rate is None:
                length = max(1, stop - start)
            for position in range(start, stop, length):
                count = min(length, stop - position)
                self._pace(count)
                self.connection.sendfile(file, position, count)

    def _pace(self, count: int) -> None:
        """Wait until this connection may send `count` more bytes."""
        if self._hub.rate is not None:
            now = time.monotonic()
            # What it has not used while it was idle is lost, but for what a late wake-up took.
            self._free_at = max(self._free_at, now - LATENESS) + count / self._hub.rate
            self._hub.closing.wait(max(0.0, self._free_at - now))

    def _drop(self, fault: Fault) -> None:
        self._hub.closing.wait(fault.stall)
        self.close_connection = True
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.connection.close()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self._send_headers(status, len(body), headers)
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_headers(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            **headers,
            "Content-Length": str(length),
        }.items():
            self.send_header(name, value)
        self.end_headers()


def _pieces(path: Path, start: int, stop: int, fault: Fault, size: int) -> Iterator[tuple[int, bytes]]:
    """The bytes from `start` to `stop` by `size`, each piece with the count of those before it, up to `drop_after`."""
    end = stop if fault.drop_after is None else min(stop, start + fault.drop_after)
    position = start
    with path.open("rb") as file:
        file.seek(start)
        while position < end:
            length = min(size, end - position)
            piece = file.read(length).ljust(length, b"\0")
            if fault.flip is not None and position <= fault.flip < position + len(piece):
                changed = bytearray(piece)
                changed[fault.flip - position] ^= 1
                piece = bytes(changed)
            yield position - start, piece
            position += len(piece)
    if fault.drop_after == 0:
        yield 0, b""


def _wait(minutes: float, parent: int, ended: threading.Event) -> None:
    """Until the time is over, `ended` is set, or the process that started this has ended."""
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
    parser.add_argument("--faults", type=int, metavar="SEED", help="let answers go wrong at random")
    parser.add_argument("--share", type=float, default=0.1, help="of the answers that do (default: 0.1)")
    parser.add_argument("--longest-stall", type=float, default=2.0, metavar="S", help="seconds (default: 2)")
    options, parent, repos = parser.parse_args(), os.getppid(), {}
    for given in options.repos:
        name, _, directory = given.partition("=")
        if not name or not Path(directory).is_dir() or not directory:
            parser.error(f"{given!r} is not NAME=DIRECTORY with a directory that exists")
        repos[name] = Path(directory)
    faults = None
    if options.faults is not None:
        faults = RandomFaults(options.faults, options.share, options.longest_stall)
    rate = options.rate * 1e6 if options.rate else None
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    with LocalHub(repos, port=options.port, rate=rate, faults=faults) as hub:
        for repo in hub.repos.values():
            hub.shelf.entries(repo)  # hashed now, so that no client waits for it
        print(hub.endpoint, flush=True)
        _wait(options.minutes, parent, ended)
    return 0


if __name__ == "__main__":
    sys.exit(main())
