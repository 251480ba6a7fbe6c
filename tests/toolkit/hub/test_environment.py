"""A variable of the environment with which no request can be made is named, with its value and what to do."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest

from scripts.fakehub.server import LocalHub
from tests.support.commands import refused, run
from tests.support.lossless import make


@pytest.mark.parametrize(
    "variable",
    [
        "HF_HUB_DOWNLOAD_TIMEOUT=abc", "HF_HUB_ETAG_TIMEOUT=abc", "HF_HUB_ETAG_TIMEOUT=", "HF_HUB_ETAG_TIMEOUT=1.5",
        "HF_ENDPOINT=http://localhost:99999", "HF_ENDPOINT=localhost", "HF_ENDPOINT=nonsense://", "HF_ENDPOINT=http://",
        "HF_ENDPOINT=http://[::1", "SSL_CERT_FILE=/nowhere", "SSL_CERT_DIR=/nowhere",
        "ALL_PROXY=socks://127.0.0.1:9", "all_proxy=socks5://127.0.0.1:9", "HTTPS_PROXY=ftp://127.0.0.1:9",
        "https_proxy=http://127.0.0.1:99999",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["download", "prepare"])
def test_a_variable_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, variable: str
) -> None:
    monkeypatch.setattr("toolkit.hub.environment.find_spec", lambda name: None)
    name, value = variable.split("=", 1)
    said = refused(command, "some/model", tmp_path / "new", **{name: value})
    assert f"the environment variable {name} " in said and repr(value) in said and "\n  next: " in said
    assert not (tmp_path / "new").exists()


def test_a_password_in_a_variable_is_not_shown(tmp_path: Path) -> None:
    said = refused("download", "some/model", tmp_path / "new", ALL_PROXY="socks://me:secret@host:1")
    assert "ALL_PROXY" in said and "secret" not in said


def test_a_token_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path))
    said = refused("download", "some/model", tmp_path / "new")
    assert f"{tmp_path}: the token of your login cannot be read" in said and "HF_TOKEN" in said


def test_odd_variables_that_do_no_harm_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("COLUMNS", "LINES", "LANG", "LC_ALL", "TERM"):
        monkeypatch.setenv(name, "abc")
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", " 20 ")
    with LocalHub({"me/bloom": make(tmp_path / "source")}) as hub:
        done = run("download", "me/bloom", tmp_path / "new", HF_ENDPOINT=hub.endpoint)
    assert done.returncode == 0 and not done.stderr


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    (tmp_path / "none.pem").write_text("no certificate")
    said = refused("download", "some/model", tmp_path / "new", SSL_CERT_FILE=str(tmp_path / "none.pem"))
    assert "the environment variable SSL_CERT_FILE" in said and "none.pem" in said


class Socks:
    """A SOCKS5 proxy for one test: it passes everything on, and counts the connections."""

    def __enter__(self) -> Socks:
        self.count, self._open = 0, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.count += 1
                near.recv(262)
                near.sendall(b"\x05\x00")
                version, command, _, kind, *rest = near.recv(262)
                assert (version, command) == (5, 1)
                host = ".".join(map(str, rest[:4])) if kind == 1 else bytes(rest[1 : 1 + rest[0]]).decode()
                far = socket.create_connection((host, int.from_bytes(bytes(rest[-2:]), "big")))
                near.sendall(b"\x05\x00\x00\x01" + bytes(6))
                self._open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("kind", ["socks5", "socks5h"])
def test_a_proxy_for_socks_is_used_if_its_package_is_there(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("socksio")
    huggingface_hub.close_session()
    with LocalHub({"me/bloom": make(tmp_path / "source")}) as hub, Socks() as proxy:
        proxied = {"HF_ENDPOINT": hub.endpoint, "ALL_PROXY": f"{kind}://{proxy.address}"}
        done = run("download", "me/bloom", tmp_path / "new", **proxied)
        huggingface_hub.close_session()
    assert done.returncode == 0 and proxy.count > 0
