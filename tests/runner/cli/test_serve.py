"""The command `serve`, as far as it needs no model."""

from __future__ import annotations

import socket

import pytest

from runner.cli.serve import listening
from runner.errors import BloomdeskError


def test_an_answer_in_two_packets_waits_for_nothing() -> None:
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_is_named() -> None:
    with listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with (
            pytest.raises(BloomdeskError, match=f"cannot listen at 127.0.0.1, port {port}"),
            listening("127.0.0.1", port),
        ):
            pass
