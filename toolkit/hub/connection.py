"""One kept connection to where a file's bytes are, read into memory that is given, and ended from any thread.

huggingface_hub's own session is the way for short answers. For hundreds of gigabytes it takes some four times
the processor's time, 64 KiB at a time, and nothing wakes a thread that waits in it.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

from toolkit.hub.client import Location, first_byte, read_timeout
from toolkit.hub.failures import ConnectionFailed, IncompleteAnswer, host_of, network_errors
from toolkit.hub.line import Line


class Unranged(Exception):
    """The bytes don't come range by range from there; in one answer from the session they may."""


class Connection:
    """Ranges of a file, one after another; one thread reads, any may hang up, and the reading one closes."""

    def __init__(self, line: Line, check: Callable[[], None]) -> None:
        """`line` says how fast it may read; `check` is called while it waits for that, and may raise to end it."""
        self._line, self._check = line, check
        self._http: http.client.HTTPConnection | None = None
        self._peer: tuple[str, bytes, int | None] | None = None
        self._socket: socket.socket | None = None
        self._hung_up = False
        # Of the monotonic clock, while it connects and waits for the header of an answer.
        self.asking_since: float | None = None

    def read(self, location: Location, start: int, room: memoryview) -> Iterator[int]:
        """Fill `room` with the file's bytes from `start` on: yields 0 when they are promised, then how many
        more came each time.

        Raises `Unranged`, or one of `network_errors`; what was yielded until then is sound.
        """
        answer, whole, host = None, False, host_of(location.url)
        try:
            self.asking_since = time.monotonic()
            answer = self._ask(location, start, start + len(room))
            self.asking_since = None
            yield 0
            while room:
                block = room[: self._line.block]
                self._line.keep_rate(len(block), self._check)
                count = answer.readinto(block)
                if not count:
                    raise IncompleteAnswer(f"{len(room):,} bytes of a range did not come", host)
                room = room[count:]
                yield count
            # False if more comes than was requested.
            whole = answer.isclosed()
        except network_errors():
            raise
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise ConnectionFailed(str(error) or type(error).__name__, host) from error
        finally:
            self.asking_since = None
            if answer is not None:
                answer.close()
            if not whole:
                self.close()

    def hang_up(self) -> None:
        """End whatever the reading thread waits for, and let it start nothing more."""
        self._hung_up = True
        self.drop()

    def drop(self) -> None:
        """End whatever the reading thread waits for; it may try again."""
        link = self._http
        # While it connects only `link` knows the socket; of an answer that ends with the connection, only we.
        held = link.sock if link is not None and link.sock is not None else self._socket
        if held is not None:
            with suppress(OSError):
                # Not the TLS socket's own method, which forgets a session that the other thread is using.
                socket.socket.shutdown(held, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket; the next range opens another."""
        link, self._http, self._socket = self._http, None, None
        if link is not None:
            link.close()

    def _ask(self, location: Location, start: int, stop: int) -> http.client.HTTPResponse:
        import httpx2

        url = httpx2.URL(location.url)
        link = self._reach(url)
        headers = {**location.headers, "range": f"bytes={start}-{stop - 1}"}
        link.request("GET", url.raw_path.decode("ascii"), headers=headers)
        answer = link.getresponse()
        response = httpx2.Response(
            answer.status, headers=answer.getheaders(), request=httpx2.Request("GET", url)
        )
        if not response.is_redirect:
            first_byte(response, location, start)
        if answer.status != 206:
            answer.close()
            raise Unranged(f"the file's store answered {answer.status} to a range")
        return answer

    def _reach(self, url: Any) -> http.client.HTTPConnection:
        peer = (url.scheme, url.raw_host, url.port)
        if self._http is None or self._peer != peer:
            self.close()
            self._http, self._peer = _connection_to(url), peer
        if self._http.sock is None:
            self._http.connect()
        self._socket = self._http.sock
        if self._hung_up:  # while it was being made
            raise ConnectionFailed("the connection was given up")
        return self._http


def _connection_to(url: Any) -> http.client.HTTPConnection:
    """A connection to be made to the host of an httpx2 URL, through the proxy that the environment names."""
    import httpx2

    host = url.raw_host.decode("ascii")
    proxies = {} if proxy_bypass(host) else getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy is None:
        kind = _SecureConnection if url.scheme == "https" else http.client.HTTPConnection
        return kind(host, url.port, timeout=read_timeout())
    through = httpx2.URL(proxy if "://" in proxy else f"http://{proxy}")
    if through.scheme != "http" or url.scheme != "https":
        raise Unranged("this kind of proxy is left to the session")
    link = _SecureConnection(through.host, through.port or 80, timeout=read_timeout())
    link.set_tunnel(host, url.port or 443, _proxy_credentials(through))
    link.server_name = host
    return link


def _proxy_credentials(through: Any) -> dict[str, str]:
    if not through.userinfo:
        return {}
    return {"Proxy-Authorization": "Basic " + b64encode(unquote(through.userinfo.decode()).encode()).decode()}


class _SecureConnection(http.client.HTTPConnection):
    default_port = 443
    server_name: str | None = None

    def connect(self) -> None:
        super().connect()
        # The handshake comes once the socket is in its place, so that hanging up ends it too.
        name = self.server_name or self.host
        self.sock = _trust().wrap_socket(self.sock, server_hostname=name, do_handshake_on_connect=False)
        self.sock.do_handshake()


@cache
def _trust() -> ssl.SSLContext:
    """The certificates that the session trusts: a tenth of a second to load, so once."""
    import httpx2

    return httpx2.create_ssl_context()
