"""A prepared directory that is being made: what it has already, whether it is ours, what is recorded in it.

The manifest is written first, so that a kill leaves a directory that is known as ours; then after each part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError
from runner.format.coded import CODED_DTYPE, LOSSLESS
from runner.format.layout import COMPANIONS, MANIFEST, REQUIRED_COMPANIONS, PartSpec, part_specs
from runner.format.manifest import CompanionRecord, Manifest, Source, load_manifest
from runner.format.safetensors import read_small
from runner.system.atomic import TEMPORARY_SUFFIX, write_atomically
from runner.system.disk import free_bytes
from toolkit.io.disk import disk_errors
from toolkit.parts.part import is_in_place

LARGEST_COMPANION = 2**26  # BLOOM's tokenizer.json has 14.5 MB
STAGING = ".source"  # where `prepare` keeps the shards that are on their way
SPARE_BYTES = 16 * 2**20  # for the manifest, the small files and what the file system keeps for itself


def load_existing(destination: Path) -> Manifest | None:
    """The manifest of what was begun in `destination`; None where it is new or empty.

    Raises `BloomdeskError` where it holds something else.
    """
    if os.path.lexists(destination) and not destination.is_dir():  # a broken link or a loop too
        raise BloomdeskError(f"{destination} is not a directory", "give a new directory to write to")
    if (destination / MANIFEST).exists():
        return load_manifest(destination)
    others = {path.name for path in destination.iterdir()} if destination.exists() else set()
    others -= {MANIFEST + TEMPORARY_SUFFIX, STAGING}
    if others:
        raise BloomdeskError(
            f"{destination} is no prepared checkpoint and is not empty: it holds {', '.join(sorted(others)[:3])}",
            "give a new or an empty directory to write to",
        )
    return None


def refuse_other_source(destination: Path, manifest: Manifest, source: Source) -> None:
    """Raise `BloomdeskError` where the directory was begun from another repo or commit."""
    if manifest.source != source:
        held = manifest.source
        what = f"{held.repo} at {held.commit}" if held.repo else "a local checkpoint"
        raise another_source(destination, f"parts of {what}")


def refuse_other_companions(destination: Path, manifest: Manifest, companions: Mapping[str, bytes]) -> None:
    """Raise `BloomdeskError` where a small file that the manifest records is another one in the source."""
    for name, record in manifest.companions.items():
        if name not in companions or xxhash.xxh3_128_hexdigest(companions[name]) != record.xxh3_128:
            raise another_source(destination, f"another {name}")


def another_source(destination: Path, what: str) -> BloomdeskError:
    """The error for going on with a directory that was begun from another source."""
    return BloomdeskError(
        f"{destination} was begun from another source: it has {what}",
        "give a new directory, or delete this one",
    )


def check_form(destination: Path, manifest: Manifest, form: str) -> Manifest:
    """The manifest of a directory in the form `form`, which it has, or can still take: no part is there yet.

    Raises `BloomdeskError` where it has parts of the other form.
    """
    if manifest.form == form:
        return manifest
    if manifest.parts:
        begun, do = ("with", "add") if manifest.form == LOSSLESS else ("without", "leave out")
        raise BloomdeskError(
            f"{destination} was begun {begun} --lossless, and a directory has one form",
            f"{do} --lossless to go on with it, or give a new directory",
        )
    model = replace(manifest.model, dtype=CODED_DTYPE) if form == LOSSLESS else manifest.model
    return replace(manifest, form=form, model=model)


def drop_missing(destination: Path, manifest: Manifest) -> Manifest:
    """`manifest` with those parts alone that are in place with the right size and header."""
    sound = {}
    for spec in part_specs(manifest.model):
        record = manifest.parts.get(spec.file)
        if record is not None and is_in_place(destination / spec.file, record):
            sound[spec.file] = record
    return replace(manifest, parts=sound)


def missing_parts(manifest: Manifest) -> tuple[PartSpec, ...]:
    """The parts that are still to be made, in the order of a pass."""
    return tuple(spec for spec in part_specs(manifest.model) if spec.file not in manifest.parts)


def read_companions(source: Path) -> dict[str, bytes]:
    """The small files of a source, those that it need not have only where it has them.

    They are carried over byte for byte, so each must be JSON, and a link must not lead out of the source or, in
    the Hub's cache (models--NAME/snapshots/COMMIT/FILE -> ../../blobs/HASH), out of the repo's folder: someone
    else's checkpoint could bring in any file of the user's.
    """
    companions = {}
    for name in COMPANIONS:
        path = source / name
        try:
            if path.is_symlink():
                _refuse_foreign(path)
            companions[name] = read_small(path, LARGEST_COMPANION)
            json.loads(companions[name])
        except FileNotFoundError:
            if name in REQUIRED_COMPANIONS:
                raise BloomdeskError(
                    f"{path} is missing", "download it from the model's page into the same directory"
                ) from None
        except OSError as error:
            raise BloomdeskError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError):
            raise BloomdeskError(
                f"{path} is not JSON", "download it from the model's page into the same directory"
            ) from None
    return companions


def _refuse_foreign(link: Path) -> None:
    home = link.parent.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    if not Path(os.path.realpath(link)).is_relative_to(home):
        raise BloomdeskError(
            f"{link} is a link out of the checkpoint, to {os.path.realpath(link)}",
            "if that is right, put a copy of the file in its place",
        )


def initialise(destination: Path, manifest: Manifest, companions: Mapping[str, bytes]) -> Manifest:
    """Make the directory with its manifest and small files; the manifest as it then is."""
    with disk_errors(destination):
        destination.mkdir(parents=True, exist_ok=True)
    write_manifest(destination, manifest)
    records = {}
    for name, data in companions.items():
        path = destination / name
        with disk_errors(path):
            if not path.is_file() or path.read_bytes() != data:
                write_atomically(path, data)
        records[name] = CompanionRecord(name, len(data), xxhash.xxh3_128_hexdigest(data))
    manifest = replace(manifest, companions=records)
    write_manifest(destination, manifest)
    return manifest


def write_manifest(destination: Path, manifest: Manifest) -> None:
    """Replace the manifest as a whole."""
    path = destination / MANIFEST
    with disk_errors(path):
        write_atomically(path, manifest.to_json().encode())


def require_free_space(destination: Path, needed: int, replaced: Iterable[Path]) -> None:
    """Raise `BloomdeskError` with the figures where the disk has less than `needed` bytes for `destination`.

    Files in `replaced` count as free: they go before what takes their place comes.
    """
    free = free_bytes(destination) + sum(path.stat().st_size for path in replaced if path.is_file())
    needed += SPARE_BYTES
    if needed > free:
        raise BloomdeskError(
            f"{destination} needs {needed:,} bytes and the disk has {free:,} free, {needed - free:,} too few",
            "make room, or give a directory on a larger disk",
        )
