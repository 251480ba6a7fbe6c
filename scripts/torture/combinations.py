"""Every command that writes or deletes, on every state of its directory, with every kind of source.

    python -m scripts.torture.combinations [--sequences 2000] [--seed 1]

After each command all bytes are compared with those of before:

- no byte is gone that somebody could miss: a file is as it was, or it is one that this program made, was damaged or
  unfinished, and is now what its record says; or a shard that `--delete-source` may delete, since the parts that name
  its sha256 are there and sound;
- what verifies as sound holds the weights of one source, and names that source's shards;
- exit status 0 means that what was asked for is there; everything else is one sentence.

Sequences are two or three commands chosen at random, one after another, on the same directories.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import CompanionRecord, Manifest, PartRecord, load_manifest, read_manifest
from runner.system.lock import sole_writer
from scripts.fakehub.checkpoint import Layout, synthetic
from scripts.fakehub.server import LocalHub
from toolkit.cli import app
from toolkit.commands.convert import convert
from toolkit.commands.download import download
from toolkit.commands.export import export
from toolkit.commands.prepare import plan_preparation
from toolkit.commands.verify import verify
from toolkit.hub import retry
from toolkit.hub.record import RECORD, load_record
from toolkit.io.progress import silent
from toolkit.parts import destination as target

SHAPE = {"hidden_size": 64, "heads": 8, "blocks": 2, "vocab_size": 280}
REPOS = {"me/a": "a", "me/b": "b"}
BLOCK, OTHER_BLOCK = "block_01.safetensors", "block_00.safetensors"
DOWN = "http://127.0.0.1:9"
Content = dict[str, bytes]


def content(directory: Path) -> Content:
    """The bytes of all files under a directory, by path; a link is its target's name."""
    found = {}
    for path in directory.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(directory))] = b"-> " + str(path.readlink()).encode()
        elif path.is_file():
            found[str(path.relative_to(directory))] = path.read_bytes()
    return found


def flip(path: Path, position: int = -40, *, keep_date: bool = False) -> None:
    """Change a bit; with `keep_date` as a failing disk does."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    if keep_date:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


class Interrupted(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_at(file: str, share: float = 0.0) -> Callable[[str, int, int], None]:
    """A progress that ends the command in `file`, at this share of its bytes."""

    def progress(name: str, done: int, total: int) -> None:
        if name == file and done >= share * total:
            raise Interrupted

    return progress


@dataclass
class World:
    """Sources and states, each made once in `base` and copied for every combination."""

    base: Path
    hub: LocalHub
    sources: dict[str, Path] = field(default_factory=dict)
    states: dict[str, Path] = field(default_factory=dict)
    # The fingerprint of each set of weights, and the sha256 of each shard that holds it.
    fingerprints: dict[str, str] = field(default_factory=dict)
    shards: dict[str, set[str]] = field(default_factory=dict)

    def source(self, name: str) -> Path:
        return self.sources[name]


def weights_of(source: str) -> str:
    """Which weights a kind of source holds; those of a decayed one that nothing vouches for are its own."""
    return source if source == "a-decayed" else source.split("-")[0]


def make_world(base: Path, hub_of: Callable[[dict[str, Path]], LocalHub]) -> World:
    """All sources and states."""
    made = base / "sources"
    shapes = {
        "a": {"layout": Layout()},
        "b": {"layout": Layout(), "seed": 7},
        "a-safetensors": {"layout": Layout(form="safetensors")},
        "a-single": {"layout": Layout(single=True)},
    }
    for name, shape in shapes.items():
        synthetic(made / name, **SHAPE, **shape)
    for name in ("b1", "a-decayed", "a-lacking"):
        shutil.copytree(made / "a", made / name)
    shards = sorted(path.name for path in (made / "a").glob("*.bin"))
    # The last bytes of a shard are the zip's directory, the first the pickle; in between lie weights.
    for name in ("b1", "a-decayed"):
        middle = (made / name / shards[2]).stat().st_size // 2
        flip(made / name / shards[2], middle, keep_date=name == "a-decayed")
    (made / "a-lacking" / shards[2]).unlink()
    for name in "ab":
        # As after --delete-source, or before all of it has been copied.
        shutil.copytree(made / name, made / f"{name}-begun")
        (made / f"{name}-begun" / shards[0]).unlink()
    retry.BACKOFF = (0.0,)
    world = World(base, hub_of({repo: made / name for repo, name in REPOS.items()}))
    os.environ["HF_ENDPOINT"] = world.hub.endpoint
    convert(made / "a", base / "prepared" / "a")
    export(base / "prepared" / "a", made / "a-export")
    shutil.copytree(made / "a-export", made / "a-exportflipped")
    flip(sorted((made / "a-exportflipped").glob("*.safetensors"))[2], -400, keep_date=True)
    for path in sorted(made.iterdir()):
        world.sources[path.name] = path
        if path.name == "a-exportflipped":
            # Its record says so, and nothing is ever made from it.
            continue
        weights = weights_of(path.name)
        if weights not in world.fingerprints:
            convert(path, base / "prepared" / weights)
            world.fingerprints[weights] = load_manifest(base / "prepared" / weights).fingerprint or ""
        hashes = {hashlib.sha256(shard.read_bytes()).hexdigest() for shard in path.iterdir()}
        world.shards.setdefault(weights, set()).update(hashes)
    # Where two hold the same tensors, either's shards may be named.
    for name, others in (("b1", "a"), ("a-decayed", "a")):
        world.shards[name] |= world.shards[others]
    for name, make in STATES.items():
        path = base / "states" / name
        path.parent.mkdir(exist_ok=True)
        make(world, path)
        world.states[name] = path
    return world


def prepared(world: World, path: Path, name: str = "a", form: str = PLAIN) -> Path:
    convert(world.source(name), path, form=form)
    return path


def half(world: World, path: Path, form: str = PLAIN) -> Path:
    with suppress(Interrupted):
        convert(world.source("a"), path, kill_at(OTHER_BLOCK), form=form)
    return path


def unrecorded(world: World, path: Path) -> Path:
    """Killed after a part was put in place, and before the manifest named it."""
    prepared(world, path)
    manifest = load_manifest(path)
    left = {file: record for file, record in manifest.parts.items() if file == "embedding.safetensors"}
    target.write_manifest(path, Manifest(manifest.model, manifest.source, left, manifest.companions))
    for file in (BLOCK, "final_layernorm.safetensors"):
        (path / file).unlink()
    return path


def in_the_way(world: World, path: Path) -> Path:
    half(world, path)
    (path / BLOCK).write_bytes(b"mine")
    return path


def changed(change: Callable[[Path], object], make: Callable[[World, Path], Path] = prepared) -> Callable:
    def state(world: World, path: Path) -> None:
        change(make(world, path))

    return state


def swap(path: Path) -> None:
    first, second = (path / OTHER_BLOCK).read_bytes(), (path / BLOCK).read_bytes()
    (path / OTHER_BLOCK).write_bytes(second)
    (path / BLOCK).write_bytes(first)


def anothers_part(world: World, path: Path) -> None:
    prepared(world, path)
    shutil.copy(world.base / "prepared" / "b" / BLOCK, path / BLOCK)


def anothers_manifest(
    make: Callable[[World, Path], Path], name: str, *, half_made: bool
) -> Callable[[World, Path], None]:
    """A manifest of another checkpoint, which may be half made, was copied over one of the two."""

    def state(world: World, path: Path) -> None:
        make(world, path)
        other = path.with_name("other")
        with suppress(Interrupted):
            convert(world.source("b"), other, kill_at(BLOCK) if half_made else silent)
        shutil.copy(other / MANIFEST, path / name)
        shutil.rmtree(other)

    return state


def own_stage(world: World, path: Path) -> None:
    """The user's own shards, put where prepare keeps those on their way."""
    (path / ".source").mkdir(parents=True)
    for shard in world.source("a").glob("*.bin"):
        shutil.copy2(shard, path / ".source")


def staged(world: World, path: Path) -> Path:
    """prepare, killed in its second part: `.source` holds the record, a shard and perhaps the beginning of one."""
    plan = plan_preparation("me/a", path)
    from toolkit.commands.build import carry_out

    with suppress(Interrupted):
        carry_out(plan, kill_at(OTHER_BLOCK))
    return path


def decayed_stage(world: World, path: Path) -> None:
    for shard in sorted((staged(world, path) / ".source").glob("*.bin")):
        flip(shard, shard.stat().st_size // 2, keep_date=True)


def partial_stage(world: World, path: Path) -> None:
    for shard in sorted((staged(world, path) / ".source").glob("*.bin")):
        data = shard.read_bytes()
        shard.unlink()
        shard.with_name(shard.name + ".incomplete").write_bytes(data[: len(data) // 2])


def foreign_stage(name: str, *, in_a_half: bool) -> Callable[[World, Path], None]:
    def state(world: World, path: Path) -> None:
        if in_a_half:
            staged_half(world, path)
            shutil.rmtree(path / ".source", ignore_errors=True)
        (path / ".source").mkdir(parents=True)
        (path / ".source" / name).write_bytes(b"mine")

    return state


def staged_half(world: World, path: Path) -> Path:
    return staged(world, path)


def downloaded(world: World, path: Path, repo: str = "me/a") -> Path:
    download(repo, path)
    return path


def half_downloaded(world: World, path: Path) -> None:
    with suppress(Interrupted):
        download("me/a", path, progress=kill_at("pytorch_model_00003-of-00004.bin"))


def exported(world: World, path: Path) -> Path:
    export(world.base / "prepared" / "a", path)
    return path


def rotten_export(world: World, path: Path) -> None:
    shard = sorted(exported(world, path).glob("*.safetensors"))[1]
    flip(shard, -400, keep_date=True)


def files(*names: str) -> Callable[[World, Path], None]:
    def state(world: World, path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"mine")

    return state


def copy_of_source(world: World, path: Path) -> None:
    shutil.copytree(world.source("b"), path)


STATES: dict[str, Callable[[World, Path], object]] = {
    "absent": lambda world, path: None,
    "empty": lambda world, path: path.mkdir(),
    "of a system": files("lost+found/x", ".DS_Store"),
    "complete": prepared,
    "complete lossless": lambda world, path: prepared(world, path, form=LOSSLESS),
    "another complete": lambda world, path: prepared(world, path, "b"),
    "half": half,
    "half lossless": lambda world, path: half(world, path, LOSSLESS),
    "unrecorded part": unrecorded,
    "in the way": in_the_way,
    "part missing": changed(lambda path: (path / BLOCK).unlink()),
    "part flipped": changed(lambda path: flip(path / BLOCK, keep_date=True)),
    "part cut": changed(lambda path: (path / BLOCK).write_bytes((path / BLOCK).read_bytes()[:-9])),
    "parts swapped": changed(swap),
    "another's part": anothers_part,
    "companion edited": changed(lambda path: flip(path / "tokenizer.json")),
    "manifest damaged": changed(lambda path: flip(path / MANIFEST, 200)),
    "manifest lost": changed(lambda path: (path / MANIFEST).unlink()),
    "backup damaged": changed(lambda path: flip(path / MANIFEST_BACKUP, 200)),
    "both lost": changed(lambda path: [(path / name).unlink() for name in (MANIFEST, MANIFEST_BACKUP)]),
    "half, manifest damaged": changed(lambda path: flip(path / MANIFEST, 200), half),
    "another's manifest": anothers_manifest(prepared, MANIFEST, half_made=False),
    "half of another's manifest": anothers_manifest(prepared, MANIFEST, half_made=True),
    "half, another's manifest": anothers_manifest(half, MANIFEST, half_made=False),
    "half, another's backup": anothers_manifest(half, MANIFEST_BACKUP, half_made=True),
    "foreign beginnings": files(
        "pytorch_model_00002-of-00004.bin.incomplete", ".source/pytorch_model_00002-of-00004.bin.incomplete"
    ),
    "own shards in stage": own_stage,
    "foreign": files("letter.txt"),
    "foreign config": files("config.json"),
    "foreign stage": foreign_stage("letter.txt", in_a_half=False),
    "foreign shard in stage": foreign_stage("pytorch_model_00002-of-00004.bin", in_a_half=False),
    "foreign file in our stage": foreign_stage("letter.txt", in_a_half=True),
    "stage is a file": lambda world, path: (path.mkdir(), (path / ".source").write_bytes(b"mine")),
    "staged": staged,
    "staged, decayed": decayed_stage,
    "staged, partial": partial_stage,
    "downloaded": downloaded,
    "downloaded, decayed": lambda world, path: flip(
        downloaded(world, path) / "pytorch_model_00002-of-00004.bin", 20_000, keep_date=True
    ),
    "downloaded, changed": lambda world, path: flip(
        downloaded(world, path) / "pytorch_model_00002-of-00004.bin", 20_000
    ),
    "half downloaded": half_downloaded,
    "another download": lambda world, path: downloaded(world, path, "me/b"),
    "a source": copy_of_source,
    "export": exported,
    "rotten export": rotten_export,
    "a file": lambda world, path: path.write_bytes(b"mine"),
    "locked": prepared,
}
SOURCES = (
    "a",
    "b",
    "b1",
    "a-safetensors",
    "a-single",
    "a-decayed",
    "a-lacking",
    "a-begun",
    "b-begun",
    "a-export",
    "a-exportflipped",
)


@dataclass(frozen=True)
class Command:
    """A command on the directory DST; `source` is a kind of source, `repo` one of the hub's or "down"."""

    words: tuple[str, ...]
    source: str = ""
    repo: str = ""

    def __str__(self) -> str:
        return " ".join((*self.words, self.source or self.repo))


def commands() -> Iterator[Command]:
    """Every command, with every kind of source that it can have."""
    for source in (*SOURCES, "typo"):
        for form, delete in itertools.product(((), ("--lossless",)), ((), ("--delete-source",))):
            yield Command(("convert", "SRC", "DST", *form, *delete), source)
        yield Command(("repair", "DST", "--source", "SRC"), source)
    for repo in (*REPOS, "down"):
        name = "me/a" if repo == "down" else repo
        yield Command(("prepare", name, "DST"), repo=repo)
        yield Command(("prepare", name, "DST", "--lossless"), repo=repo)
        yield Command(("download", name, "DST"), repo=repo)
        yield Command(("download", name, "DST", "--check"), repo=repo)
    for repo in ("me/a", "down"):
        yield Command(("repair", "DST"), repo=repo)
    yield Command(("export", "PREPARED", "DST"))
    yield Command(("export", "DST", "NEW"))
    yield Command(("verify", "DST"))
    yield Command(("verify", "DST", "--quick"))


def combinations() -> list[tuple[str, Command]]:
    """Every state with every command."""
    return list(itertools.product(STATES, commands()))


class Trial:
    """Copies of a state and a source in `directory`, on which commands run and are checked."""

    def __init__(self, world: World, state: str, directory: Path) -> None:
        self.world, self.state, self.directory = world, state, directory
        self.destination = directory / "dst"
        before = world.states[state]
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
            "NEW": str(self.directory / "new"),
            "PREPARED": str(self.world.base / "prepared" / "a"),
        }
        arguments = [places.get(word, word) for word in command.words]
        known = recorded(self.destination)
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
        if place.parts[0] == "dst" and inside in (MANIFEST, MANIFEST_BACKUP):
            assert known is not None, f"{path} was not ours"
            now = load_manifest(self.destination)
            for file, record in known.parts.items():
                assert now.parts[file].source_tensors == record.source_tensors, f"{file}: another record"
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
                    fingerprint = manifest.fingerprint
                    names = [name for name, known in self.world.fingerprints.items() if known == fingerprint]
                    assert names, "sound, and the weights of no source"
                    hashes = {each.sha256 for part in manifest.parts.values() for each in part.sources}
                    assert hashes <= self.world.shards[names[0]], "sound, and made from other shards"
        if status:
            return
        if verb in ("convert", "prepare"):
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


def sequence(world: World, seed: int, directory: Path) -> None:
    """Two or three commands on a state, all chosen by `seed`."""
    chance = random.Random(seed)
    state, every = chance.choice([name for name in STATES if name != "locked"]), list(commands())
    trial = Trial(world, state, directory)
    done = []
    for _ in range(chance.choice((2, 3))):
        command = chance.choice(every)
        done.append(str(command))
        shutil.rmtree(directory / "new", ignore_errors=True)
        # Rot stays where it is, whatever the command.
        trial.state = f"{state} keeps: " + ", ".join(done)
        trial.run(command)


def scratch() -> str | None:
    """Memory instead of a disk, if the system has such a directory: every command syncs its files."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> None:
    """Run all combinations, then sequences; exit status 1 if a rule was broken."""
    parser = argparse.ArgumentParser(description="Try every command on every state of its directory.")
    parser.add_argument("--sequences", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    failures = []
    with ExitStack() as opened:
        base = Path(opened.enter_context(tempfile.TemporaryDirectory(dir=scratch())))
        world = make_world(base, lambda repos: opened.enter_context(LocalHub(repos)))
        cases: list[Callable[[Path], None]] = [
            lambda path, case=case: Trial(world, case[0], path).run(case[1]) for case in combinations()
        ]
        cases += [
            lambda path, seed=seed: sequence(world, seed, path)
            for seed in range(given.seed * 10**6, given.seed * 10**6 + given.sequences)
        ]
        for number, case in enumerate(cases):
            with tempfile.TemporaryDirectory(dir=scratch()) as directory:
                try:
                    case(Path(directory))
                except AssertionError as error:
                    failures.append(str(error))
                    print(f"FAILED {error}\n", flush=True)
            if number % 500 == 499:
                print(f"{number + 1} of {len(cases)}, {len(failures)} failures", flush=True)
    print(
        json.dumps(
            {
                "combinations": len(cases) - given.sequences,
                "sequences": given.sequences,
                "failures": len(failures),
            }
        )
    )
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
