"""A file on the Hub that is read here and there: the right bytes over a bad line, few of them, and no other file's."""

from __future__ import annotations

import random

import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.server import Fault
from tests.support.bloom_repos import FILE, NAME
from toolkit.hub.connection import Unranged
from toolkit.hub.line import Line, nothing
from toolkit.hub.remote_file import PAGE, RemoteFile
from toolkit.hub.revision import resolve

pytest_plugins = ["tests.support.network"]
pytestmark = pytest.mark.usefixtures("client", "surroundings")

SIZE = 100_000


@pytest.fixture
def remote(one):
    revision = resolve(NAME)
    with RemoteFile(revision, revision.find(FILE), Line(), nothing) as opened:
        yield opened


def test_what_is_read_is_the_files(one, remote, single) -> None:
    data, draw = (single / FILE).read_bytes(), random.Random(1)
    one.fail(
        FILE,
        Fault(drop_after=3000, times=2),
        Fault(status=503, times=2),
        Fault(reset=True, drop_after=0, times=1),
    )
    for _ in range(40):
        start, size = draw.randrange(SIZE + 10), draw.randrange(9000)
        assert remote.seek(start) == remote.tell() == start
        assert remote.read(size) == data[start : start + size]
    assert remote.seek(-22, 2) == SIZE - 22
    assert remote.read(100) == data[-22:] and remote.seek(-5, 1) == SIZE - 5
    # Nothing comes twice.
    assert remote.received <= SIZE
    assert len(one.asked("HEAD", FILE)) <= 6


def test_a_few_bytes_are_a_page(remote) -> None:
    remote.seek(50_000)
    remote.read(30)
    remote.read(60)
    assert remote.received == PAGE


def test_a_server_without_ranges_is_no_place_to_seek_in(one, remote) -> None:
    one.fail(FILE, Fault(ignore_range=True))
    with pytest.raises(Unranged):
        remote.read(10)


def test_another_file_is_told(one, remote) -> None:
    one.fail(FILE, Fault(method="HEAD", etag="0" * 64))
    with pytest.raises(BloomdeskError, match="is another file: its sha256 should be"):
        remote.read(10)
