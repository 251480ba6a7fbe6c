"""The end of a server process: nobody who sends or reads nothing holds it up."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from subprocess import TimeoutExpired
from urllib.parse import urlsplit

import pytest

from runner.server.jobs.data import FILES, data_directory
from runner.server.jobs.files import INPUT, Files
from tests.support.server_process import server_process

pytestmark = pytest.mark.slow
# Bytes of a file that no connection's buffers hold.
LARGE = 2**26
JSON = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
FORM = b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"


def with_large_file(data: Path) -> bytes:
    """A request for a file that is new in a data directory."""
    with data_directory(data):
        stored = Files(data / FILES, time.time).add("large", INPUT, [bytes(LARGE)]).id
    return f"GET /v1/files/{stored}/content HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def test_a_second_signal_ends_at_once(prepared, tmp_path: Path) -> None:
    """While the first waits for a client that reads nothing."""
    asked = with_large_file(tmp_path / "data")
    with server_process(prepared()[1], tmp_path, "--data", str(tmp_path / "data")) as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port)) as client:
            client.sendall(asked)
            client.recv(1)
            server.process.send_signal(signal.SIGINT)
            with pytest.raises(TimeoutExpired):
                server.process.wait(0.5)
            assert "once more ends at once" in server.log.read_text()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 128 + signal.SIGTERM


def test_whoever_sends_or_reads_nothing_holds_up_no_end(prepared, tmp_path: Path) -> None:
    directory, data = prepared()[1], tmp_path / "data"
    asked = with_large_file(data)
    with server_process(directory, tmp_path, "--data", str(data)) as server:
        address = urlsplit(server.url)
        sent = {
            "nothing": b"",
            "part of a head": b"GET / HT",
            "part of a body": JSON + b"Content-Length: 50\r\n\r\n{",
            "part of a form": FORM + b"Content-Length: 100000000\r\n\r\n--b",
            "all, and reads nothing": asked,
        }
        clients = {name: socket.create_connection((address.hostname, address.port)) for name in sent}
        for name, client in clients.items():
            client.sendall(sent[name])
        time.sleep(0.5)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert time.monotonic() - began < 20
        told = clients["part of a body"].recv(2**16)
        assert b"503" in told and b"shutting_down" in told
        for client in clients.values():
            client.close()
