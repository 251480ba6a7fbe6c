"""What systems put into directories makes none of them "not empty", and is left as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.errors import BloomdeskError
from scripts.fakehub.server import LocalHub
from tests.support.lossless import make
from toolkit.commands.convert import convert
from toolkit.commands.export import export
from toolkit.commands.prepare import prepare
from toolkit.commands.verify import verify
from toolkit.parts.destination import load_existing

FILES = (".bloomdesk.lock", ".DS_Store", "._.DS_Store", "Thumbs.db", "desktop.ini", ".directory", ".nfs0001")
DIRECTORIES = ("lost+found", "System Volume Information", "$RECYCLE.BIN", ".Trash-1000", ".Trashes", "@eaDir")


def cluttered(directory: Path) -> dict[str, bytes]:
    """Put everything of that kind into a new directory; the content of the files."""
    directory.mkdir()
    left = {name: name.encode() for name in FILES} | {f"{name}/kept": b"kept" for name in DIRECTORIES}
    for name, data in left.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    return left


def test_a_directory_with_clutter_is_empty_for_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, directories = make(tmp_path / "source"), [tmp_path / name for name in ("made", "fetched", "back")]
    left = [cluttered(directory) for directory in directories]
    convert(source, directories[0])
    with LocalHub({"me/bloom": source}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        prepare("me/bloom", directories[1])
    export(directories[0], directories[2])
    for directory, files in zip(directories, left, strict=True):
        assert {name: (directory / name).read_bytes() for name in files} == files
    assert verify(directories[0]).sound and verify(directories[1]).sound


@pytest.mark.parametrize("name", ["letter.txt", "lost", "Trash", "nfs", "model.safetensors", "thumbs.db.bak"])
def test_anything_else_is_not_clutter(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(BloomdeskError, match=f"is not empty: it holds {name}"):
        load_existing(tmp_path)
