"""A command on copies of a state and a source, and the rules that must hold afterwards."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable
from contextlib import (
    AbstractContextManager,
    ExitStack,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.layout import MANIFEST, MANIFEST_BACKUP, SPREADING
from runner.format.manifest import CompanionRecord, Manifest, load_manifest, read_manifest
from runner.format.part_record import PartRecord
from runner.system.lock import sole_writer
from scripts.torture.attempt import assert_no_row_lost
from scripts.torture.world import (
    DOWN,
    REPOS,
    Content,
    World,
    beside,
    content,
    weights_of,
)
from toolkit.cli import app
from toolkit.commands.verify import verify
from toolkit.hub.record import RECORD, load_record


@dataclass(frozen=True)
class Command:
    """A command on the directory DST; `source` is a kind of source, `repo` one of the hub's or "down"."""

    words: tuple[str, ...]
    source: str = ""
    repo: str = ""

    def __str__(self) -> str:
        return " ".join((*self.words, self.source or self.repo))


class Trial:
    """Copies of a state and a source in `directory`, on which commands run and are checked."""

    def __init__(self, world: World, state: str, directory: Path) -> None:
        self.world, self.state, self.directory = world, state, directory
        self.destination = directory / "dst"
        self.other_disk = directory / "also"
        before = world.states[state]
        if beside(before).is_dir():
            shutil.copytree(beside(before), self.other_disk)
        if before.is_dir():
            shutil.copytree(before, self.destination, symlinks=True)
        elif before.exists():
            shutil.copy2(before, self.destination)

    def run(
        self,
        command: Command,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        keep_source: bool = False,
    ) -> None:
        """Run a command within `around`, on a fresh copy of its source; AssertionError if it broke one of the rules."""
        source = self.directory / "src"
        if keep_source and source.exists():
            pass
        elif command.source and command.source != "typo":
            shutil.rmtree(source, ignore_errors=True)
            shutil.copytree(self.world.source(command.source), source)
        elif command.source:
            source = self.directory / "typo"
        places = {
            "SRC": str(source),
            "DST": str(self.destination),
            "ALSO": str(self.other_disk),
            "NEW": str(self.directory / "new"),
            "PREPARED": str(self.world.base / "prepared" / "a"),
        }
        arguments = [places.get(word, word) for word in command.words]
        known = {"dst": recorded(self.destination), "also": recorded(self.other_disk)}
        stamps = stamps_of(self.directory)
        before = content(self.directory)
        with ExitStack() as held:
            if self.state == "locked":
                held.enter_context(sole_writer(self.destination))
            held.enter_context(around())
            status, out, errors = run(arguments, DOWN if command.repo == "down" else self.world.hub.endpoint)
        after = content(self.directory)
        try:
            self._check(command, status, out, errors, before, after, known, stamps)
        except AssertionError as error:
            raise AssertionError(
                f"{self.state} / {command}: {error}\nstatus {status}\n{out[-600:]}\n{errors[-900:]}"
            ) from None

    def _check(self, command, status, out, errors, before, after, known, stamps) -> None:
        last = [line for line in errors.splitlines() if line.strip()][-2:]
        assert "Traceback" not in errors and "unexpected" not in errors, "no clear sentence"
        is_reported = command.words[0] == "verify" and (status == 1 or "could not be checked" in out)
        if status and not is_reported:
            assert any(line.startswith("error: ") for line in last), "no error is said"
        lost = {path: data for path, data in before.items() if after.get(path) != data}
        for path, data in lost.items():
            self._check_loss(command, path, data, before, after, known, stamps)
        self._check_sound(command, status)
        if command.words[0] == "verify":
            assert status in (0, 1, 2), "another status"
            assert before == after, "verify wrote"

    def _check_loss(self, command, path, data, before, after, known, stamps) -> None:
        place, name = Path(path), Path(path).name
        new = after.get(path)
        if place.parts[0] == "src":
            assert "--delete-source" in command.words and new is None, f"{path} of the source is gone"
            self._check_deleted(name, data)
            return
        if name.endswith(".incomplete"):
            assert data != b"mine", f"{path} was not ours"
            return
        inside = "/".join(place.parts[1:])
        known = known.get(place.parts[0])
        if known is not None and inside in (MANIFEST, MANIFEST_BACKUP):
            now = load_manifest(self.directory / place.parts[0])
            for file, record in known.parts.items():
                assert now.parts[file].source_tensors == record.source_tensors, f"{file}: another record"
            return
        if command.words[0] == "spread":
            self._check_spread(place, data, after, known)
            return
        if place.parts[0] == "dst" and known is not None and inside in records_of(known):
            record = records_of(known)[inside]
            assert new is not None and hash_of(new) == record.xxh3_128, f"{path} is gone"
            return
        if inside in (RECORD, "bloomdesk-export.json"):
            assert new is not None, f"{path} is gone"
            return
        if inside.startswith(".source/"):
            # Also without a record, which may be what could not be written: what is right came from the Hub.
            right = self.world.source(REPOS[command.repo]) / name if command.repo in REPOS else None
            is_right = right is not None and right.exists() and right.read_bytes() == data
            assert is_right or f"dst/.source/{RECORD}" in before, f"{path} was not ours"
            assert data != b"mine" and self.state != "own shards in stage", f"{path} was not ours"
            return
        aside = [
            other for other, found in after.items() if other.startswith(path + ".changed") and found == data
        ]
        if aside:
            return
        record = stamps.get(path)
        if command.words[0] == "download" and record is not None:
            right = self.world.source(REPOS[command.words[1]]) / name
            assert new == right.read_bytes() or new is None, (
                f"{path} is neither what it was nor what it should be"
            )
            return
        if command.words[0] == "export" and "dst/model.safetensors.index.json" in before:
            right = self.world.sources["a-export"] / name
            assert new == right.read_bytes(), f"{path} was replaced by something else"
            return
        raise AssertionError(f"{path} is {'gone' if new is None else 'another'}")

    def _check_spread(self, place: Path, data: bytes, after: Content, known: Manifest | None) -> None:
        """A file of these bytes may be gone: its part is on both disks, or it has got its place."""
        if place.parts[1] == SPREADING:
            is_manifest = place.name in (MANIFEST, MANIFEST_BACKUP)
            assert is_manifest or after.get(f"dst/{place.name}") == data, f"{place} is gone"
            return
        assert place.parts[0] == "dst" and known is not None and place.name in known.parts, f"{place} is gone"
        alone = replace(known, parts={place.name: known.parts[place.name]})
        assert_no_row_lost(alone, self.destination, [self.other_disk])

    def _check_deleted(self, name: str, data: bytes) -> None:
        """A shard of these bytes may be gone: sound parts were made from it."""
        manifest = load_manifest(self.destination)
        sha256 = hashlib.sha256(data).hexdigest()
        made = [
            record
            for record in manifest.parts.values()
            if any((each.file, each.sha256) == (name, sha256) for each in record.sources)
        ]
        assert made, f"{name} was deleted, and no part was made from it"
        for record in made:
            found = (self.destination / record.file).read_bytes()
            assert hash_of(found) == record.xxh3_128, f"{name} was deleted, and {record.file} is damaged"

    def _check_sound(self, command: Command, status: int) -> None:
        verb = command.words[0]
        is_prepared = (self.destination / MANIFEST).is_file()
        fingerprint = None
        if is_prepared:
            with suppress(BloomdeskError):
                report, manifest = verify(self.destination), load_manifest(self.destination)
                if report.sound:
                    fingerprint = manifest.source_fingerprint
                    hashes = {each.sha256 for part in manifest.parts.values() for each in part.sources}
                    if manifest.slice is not None and fingerprint is None:
                        # Its rows came alone, and only the Hub says of which shards.
                        names = [name for name, shards in self.world.shards.items() if hashes <= shards]
                        fingerprint = self.world.fingerprints[names[0]]
                    names = [name for name, known in self.world.fingerprints.items() if known == fingerprint]
                    assert names, "sound, and the weights of no source"
                    assert hashes <= self.world.shards[names[0]], "sound, and made from other shards"
        if status:
            return
        if verb == "spread":
            assert all(verify(each).sound for each in (self.destination, self.other_disk)), (
                "spread, and not sound"
            )
        if command.words[1] == "DST" and verb == "convert":
            assert verify(self.directory / "new").sound, "converted, and not sound"
            known = load_manifest(self.directory / "new").source_fingerprint
            assert known in self.world.fingerprints.values(), "converted, and the weights of no source"
        elif command.words[1] == "PREPARED" and verb == "convert":
            assert "keeps" in self.state or fingerprint == self.world.fingerprints["a"], (
                "not what was asked for"
            )
        elif verb in ("convert", "prepare"):
            wanted = weights_of(command.source) if command.source else REPOS[command.words[1]]
            if "keeps" not in self.state:
                assert self.state in UNREAD or fingerprint == self.world.fingerprints[wanted], (
                    "not what was asked for"
                )
        if verb == "repair":
            assert not [item for item in verify(self.destination).damage if "been made" not in item.what], (
                "repaired, and damaged"
            )
        if verb == "export":
            place = self.destination if command.words[2] == "DST" else self.directory / "new"
            wanted = content(self.world.sources["a-export"])
            found = content(place)
            if command.words[1] == "PREPARED":
                assert {name: found.get(name) for name in wanted if name.endswith("safetensors")} == {
                    name: data for name, data in wanted.items() if name.endswith("safetensors")
                }, "the export is another"
        if verb == "download":
            repo = content(self.world.source(REPOS[command.words[1]]))
            found = content(self.destination)
            wrong = [name for name, data in repo.items() if found.get(name) != data]
            if self.state.split(" keeps: ")[0] in UNREAD and "--check" not in command.words:
                return
            assert not wrong, f"downloaded, and {wrong[:3]} are other files"


# States whose parts or shards are damaged in a way that only reading them shows, which convert, prepare and download
# without --check do not do to what they keep.
UNREAD = ("part flipped", "parts swapped", "another's part", "downloaded, decayed")


def run(arguments: list[str], endpoint: str) -> tuple[int, str, str]:
    """Exit status and output of a command in this process."""
    out, errors = io.StringIO(), io.StringIO()
    os.environ["HF_ENDPOINT"] = endpoint
    with redirect_stdout(out), redirect_stderr(errors):
        status = app.run(arguments)
    return status, out.getvalue(), errors.getvalue()


def recorded(directory: Path) -> Manifest | None:
    """What a prepared directory's manifest, or else its backup, records; None if they are of two checkpoints."""
    found = []
    for name in (MANIFEST, MANIFEST_BACKUP):
        with suppress(BloomdeskError):
            found.append(read_manifest(directory / name))
    tensors = [{file: part.source_tensors for file, part in each.parts.items()} for each in found]
    if len(found) == 2 and any(
        tensors[0][file] != tensors[1][file] for file in tensors[0].keys() & tensors[1]
    ):
        return None
    return found[0] if found else None


def records_of(manifest: Manifest) -> dict[str, PartRecord | CompanionRecord]:
    return {record.file: record for record in manifest.records}


def stamps_of(directory: Path) -> dict[str, bool]:
    """Files that a download recorded, and that have the recorded size and date."""
    with suppress(BloomdeskError, OSError):
        record = load_record(directory / "dst")
        if record is not None:
            return {
                f"dst/{name}": True for name, file in record.files.items() if file.sound_in(directory / "dst")
            }
    return {}


def hash_of(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)
