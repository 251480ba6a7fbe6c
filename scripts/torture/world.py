"""Checkpoints, hubs, and every state that a directory may be in, each made once and copied for every trial."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import (
    suppress,
)
from dataclasses import dataclass, field
from pathlib import Path

from runner.format.coded import LOSSLESS, PLAIN
from runner.format.layout import MANIFEST, MANIFEST_BACKUP
from runner.format.manifest import Manifest, load_manifest
from runner.format.quantised import INT4_FORM
from scripts.fakehub.checkpoint import Layout, synthetic
from scripts.fakehub.server import LocalHub
from toolkit.commands.build import carry_out
from toolkit.commands.convert import convert
from toolkit.commands.download import download
from toolkit.commands.export import export
from toolkit.commands.prepare import plan_preparation
from toolkit.commands.spread import spread
from toolkit.hub import retry
from toolkit.io.progress import Progress, silent
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


def spread_over(world: World, path: Path, progress: Progress = silent) -> None:
    """Over two disks, the other one beside the state; killed if `progress` ends it."""
    prepared(world, path)
    with suppress(Interrupted):
        spread(path, [beside(path)], progress, shares=(2, 1))


def beside(state: Path) -> Path:
    """Where the second slice of a state is, if it has one."""
    return state.with_name(state.name + ", other disk")


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
    "complete int4": lambda world, path: prepared(world, path, form=INT4_FORM),
    "half int4": lambda world, path: half(world, path, INT4_FORM),
    "spread": spread_over,
    "half spread": lambda world, path: spread_over(world, path, kill_at(BLOCK)),
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


def scratch() -> str | None:
    """Memory instead of a disk, if the system has such a directory: every command syncs its files."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
