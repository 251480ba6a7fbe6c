"""Somebody else answers in place of the Hub, or says nothing that ends: it is not kept, and who it was is said."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import huggingface_hub
import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.server import Fault
from tests.support.bloom_repos import NAME, SHARD, VICTIM, assert_whole
from toolkit.commands.download import download
from toolkit.hub import client, retry
from toolkit.hub import revision as hub
from toolkit.hub.line import Line

pytest_plugins = ("tests.support.network",)
pytestmark = pytest.mark.usefixtures("client", "surroundings", "no_thread_is_left")

CERTIFICATE = Path(__file__).parents[2] / "support" / "localhost.pem"
PAGE = b"<html><body>Blocked by your company</body></html>" * 20
# Pages as they come; the last ones are of no kind that gives them away.
PAGES = {
    "HTML": Fault(page=PAGE),
    "HTML in chunks": Fault(page=PAGE, chunked=True),
    "HTML of the file's size": Fault(page=PAGE.ljust(SHARD)[:SHARD]),
    "text in chunks": Fault(page=b"Blocked", kind="text/plain", chunked=True),
    "bytes in chunks, too many": Fault(
        page=b"x" * (SHARD + 1), kind="application/octet-stream", chunked=True
    ),
}


@pytest.fixture(params=[1, 4])
def connections(request, small_ranges):
    return request.param


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("begun", [False, True])
def test_a_page_in_place_of_a_file_is_refused_before_a_byte_is_kept(
    local, repo, target, name, begun, connections
):
    fault = PAGES[name]
    if begun:
        local.fail(VICTIM, Fault(drop_after=SHARD // 2, times=1))
    local.fail(VICTIM, fault)
    with pytest.raises(BloomdeskError, match=f"{VICTIM} of {NAME} does not come: ") as caught:
        download(NAME, target, connections=connections, line=Line(patience=1e6))
    assert "127.0.0.1" in caught.value.message and fault.kind in caught.value.message
    assert "check the proxy" in caught.value.hint
    kept = (target / f"{VICTIM}.incomplete").read_bytes()
    assert kept == (repo / VICTIM).read_bytes()[: len(kept)]
    local.faults.clear()
    assert download(NAME, target).resumed == len(kept)
    assert_whole(target, repo)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_page_in_place_of_a_small_file(local, target, file):
    local.fail(file, Fault(page=PAGE, kind="text/plain", chunked=True))
    with pytest.raises(BloomdeskError, match=f"{file} of {NAME} does not come: 127.0.0.1 sent .* text/plain"):
        download(NAME, target)
    assert (target / f"{file}.incomplete").stat().st_size == 0


def test_a_page_in_place_of_the_files_description(local, target):
    local.fail(VICTIM, Fault(method="HEAD", page=PAGE, chunked=True))
    with pytest.raises(
        BloomdeskError, match=r"127.0.0.1:\d+ answers as no Hub does, without a commit"
    ) as caught:
        download(NAME, target)
    assert "check the proxy" in caught.value.hint


def test_a_page_in_place_of_the_list_of_files(local, target):
    local.fail(f"/api/models/{NAME}/revision/main", Fault(page=PAGE))
    with pytest.raises(BloomdeskError, match=r"gave no JSON but text/html of 127.0.0.1") as caught:
        download(NAME, target)
    assert "the proxy" in caught.value.hint


def test_an_answer_without_a_length_that_is_the_files(local, repo, target, monkeypatch):
    monkeypatch.setattr(client, "LARGEST_PAGE", 50_000)
    data = (repo / VICTIM).read_bytes()
    local.fail(VICTIM, Fault(page=data, kind="application/octet-stream", chunked=True))
    small = (repo / "config.json").read_bytes()
    local.fail("config.json", Fault(page=small, kind="text/plain", chunked=True))
    download(NAME, target)
    assert_whole(target, repo)


def test_a_page_that_goes_away_is_gone_on_after(local, repo, target, connections):
    local.fail(VICTIM, Fault(page=PAGE, times=2))
    download(NAME, target, connections=connections)
    assert_whole(target, repo)


# The connection is left to the thread that still waits for it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("path", "fault"),
    [
        (f"/api/models/{NAME}/revision/main", Fault(trickle=0.01)),
        (VICTIM, Fault(method="HEAD", trickle=0.01)),
        (VICTIM, Fault(trickle=0.01)),
        (VICTIM, Fault(trickle=0.01, since=100_000)),
    ],
    ids=["list of files", "description", "file", "range"],
)
def test_header_bytes_that_trickle_in_are_not_waited_for(
    local, target, path, fault, connections, monkeypatch
):
    monkeypatch.setattr(client, "SECONDS_OF_A_SHORT_ANSWER", 0.1)
    monkeypatch.setattr("toolkit.hub.ranges.SECONDS_BETWEEN_BLOCKS", 0.05)
    monkeypatch.setattr(retry, "BACKOFF", (0.0,))
    local.fail(path, fault)
    if fault.since:
        local.fail(VICTIM, Fault(drop_after=fault.since))
    began = time.monotonic()
    with pytest.raises(BloomdeskError, match=r"cannot be reached|does not give"):
        download(NAME, target, connections=connections)
    assert time.monotonic() - began < 5


@contextmanager
def answering(answer):
    """The port of a server that has `answer` answer each connection, and the connections so far."""
    accepted = []

    def serve():
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                accepted.append(connection)
                with connection, suppress(OSError):
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1], accepted
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def distrusted():
    """The address of a server with a certificate that nobody has signed, and the connections to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    with answering(lambda each: context.wrap_socket(each, server_side=True).close()) as (port, accepted):
        yield f"https://localhost:{port}", accepted


@pytest.mark.parametrize("who", ["the Hub", "its store"])
def test_a_certificate_that_is_not_trusted_is_said_once(
    local, target, distrusted, who, connections, monkeypatch
):
    address, accepted = distrusted
    if who == "the Hub":
        monkeypatch.setenv("HF_ENDPOINT", address)
    else:
        local.fail(VICTIM, Fault(method="HEAD", location=f"{address}/file"))
    with pytest.raises(
        BloomdeskError, match=r"the certificate of localhost:\d+ is not trusted: self.signed"
    ) as caught:
        download(NAME, target, connections=connections, line=Line(patience=1e6))
    assert "SSL_CERT_FILE" in caught.value.hint
    assert len(accepted) == 1


def test_a_certificate_in_ssl_cert_file_is_trusted(distrusted, monkeypatch):
    address, _ = distrusted
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
    monkeypatch.setenv("HF_ENDPOINT", address)
    huggingface_hub.close_session()
    # That server says no more than hello.
    with pytest.raises(BloomdeskError, match="cannot be reached"):
        hub.resolve(NAME)


def test_a_commit_that_nobody_has_named_is_not_blamed_on_an_option(local, pins, target):
    local.fail(VICTIM, Fault(method="HEAD", status=404, code="RevisionNotFound"))
    with pytest.raises(BloomdeskError, match="has no revision") as caught:
        download("bigscience/bloom", target)
    assert "--revision" not in caught.value.worded() and "mirror" in caught.value.hint


@pytest.mark.parametrize("answer", ["407 Proxy Authentication Required", "403 Forbidden"])
def test_a_proxy_that_refuses_is_not_asked_again(local, target, answer, monkeypatch):
    def refuse(connection):
        connection.recv(4096)
        connection.sendall(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())

    with answering(refuse) as (port, accepted):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
        with pytest.raises(BloomdeskError, match=f"the proxy refuses hub.example: .*{answer[:3]}") as caught:
            download(NAME, target)
    assert "HTTPS_PROXY" in caught.value.hint and len(accepted) == 1
