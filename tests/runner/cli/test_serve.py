"""The command `serve`, as far as it needs no model."""

from __future__ import annotations

import socket

import pytest

from runner.cli.serve import KEY_VARIABLE, keys_of, listening
from runner.errors import BloomdeskError


def test_an_answer_in_two_packets_waits_for_nothing() -> None:
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        ((), "k1, k2", ("k1", "k2")),
        ((), " k1 ,,", ("k1",)),
        ((" k1 ", "k2"), "ignored", ("k1", "k2")),
        ((), "", ()),
    ],
)
def test_what_surrounds_keys_is_no_part_of_them(
    given: tuple[str, ...], variable: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, variable)
    assert keys_of(given) == expected


@pytest.mark.parametrize(("given", "variable"), [((), " , ,"), ((" ",), "")])
def test_a_blank_key_is_refused(
    given: tuple[str, ...], variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, variable)
    with pytest.raises(BloomdeskError, match="key is blank"):
        keys_of(given)


def test_a_port_that_is_taken_is_named() -> None:
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with (
            pytest.raises(BloomdeskError, match=f"cannot listen at 127.0.0.1, port {port}"),
            listening("127.0.0.1", port),
        ):
            pass
