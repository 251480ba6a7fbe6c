"""A prepared directory that is being made: what exists, whether it can be resumed, what its manifest records.

The manifest is written first, so that a kill leaves a directory that is recognised, and again after each part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import xxhash

from runner.errors import BloomdeskError, in_shell
from runner.format.layout import (
    COMPANIONS,
    MANIFEST,
    MANIFEST_BACKUP,
    REQUIRED_COMPANIONS,
    TOKENIZER,
    PartSpec,
)
from runner.format.manifest import CompanionRecord, Manifest, load_manifest
from runner.format.slice_set import refuse_while_spreading
from runner.format.slices import Slice
from runner.system.atomic import TEMPORARY_SUFFIX, write_atomically
from runner.system.clutter import is_clutter
from runner.system.disk import free_bytes
from toolkit.io.disk import disk_errors, read_if_exists
from toolkit.parts.part import is_in_place
from toolkit.source.dtype import Choice
from toolkit.source.lfs import read_small_file

# BLOOM's tokenizer.json has 14.5 MB.
LARGEST_COMPANION = 2**26
COMPANION_AGAIN = "download it from the model's page into the same directory"
# Where `prepare` keeps the shards that are on their way.
STAGING = ".source"
# For the manifest and what the file system itself needs.
SPARE_BYTES = 16 * 2**20


def load_existing(destination: Path) -> Manifest | None:
    """The manifest in `destination`, or None if that is new or empty.

    Raises `BloomdeskError` if it holds something else, or its manifest is not sound.
    """
    if any(os.path.lexists(destination / name) for name in (MANIFEST, MANIFEST_BACKUP)):
        return load_manifest(destination)
    others = other_files(destination, {MANIFEST + TEMPORARY_SUFFIX, STAGING})
    if others:
        raise BloomdeskError(
            f"{destination} is no prepared checkpoint and is not empty: it holds {', '.join(others[:3])}",
            "give a new or an empty directory to write to",
        )
    return None


def other_files(destination: Path, ours: set[str]) -> list[str]:
    """Names in `destination` but `ours` and those that systems put there, sorted; none if it is new.

    Raises `BloomdeskError` if it is no directory.
    """
    # A broken link or a loop exists too.
    if os.path.lexists(destination) and not destination.is_dir():
        raise BloomdeskError(f"{destination} is not a directory", "give a new directory to write to")
    names = {path.name for path in destination.iterdir()} if destination.exists() else set()
    return sorted(name for name in names - ours if not is_clutter(name))


def resume(
    destination: Path,
    existing: Manifest | None,
    fresh: Manifest,
    companions: Mapping[str, bytes],
    mend: Collection[str] | None = None,
) -> Manifest:
    """The manifest to start from: `fresh`, or what `existing` records of parts that are in place.

    Those to `mend`, if that is given, are the ones that a check has found not to be; others may be unreadable.
    Raises `BloomdeskError` if `existing` is of another form, source or model, or has another of the small files.
    """
    refuse_while_spreading(destination)
    if existing is None:
        return fresh
    check_form(destination, existing, fresh.form)
    check_slice(destination, existing, fresh.slice)
    if existing.source != fresh.source:
        held = existing.source
        what = f"{held.repo} at {held.commit}" if held.repo else "a local checkpoint"
        raise another_source(destination, f"parts of {what}")
    if not existing.parts:
        # Nothing has the earlier form and dtype yet.
        model = replace(existing.model, dtype=fresh.model.dtype)
        existing = replace(existing, form=fresh.form, model=model, samples={}, slice=fresh.slice)
    # Directories may move; one that is made alone says nothing of the others.
    existing = replace(existing, places=fresh.places or existing.places)
    # Earlier versions did not read generation_config.json, and no part depends on it.
    existing = replace(existing, model=replace(existing.model, eos_token_id=fresh.model.eos_token_id))
    if existing.model != fresh.model:
        raise another_source(destination, "parts of a model with other hyperparameters")
    for name, record in existing.companions.items():
        if name not in companions or xxhash.xxh3_128_hexdigest(companions[name]) != record.xxh3_128:
            raise another_source(destination, f"another {name}")
        if mend is None and read_if_exists(destination / name, LARGEST_COMPANION) not in (
            None,
            companions[name],
        ):
            raise BloomdeskError(
                f"{destination / name} is damaged or has changed since it was made",
                f"bloomdesk repair {in_shell(destination)} puts the recorded one back; yours would be lost",
            )
    if mend is None:
        return drop_missing(destination, existing)
    return replace(existing, parts={file: part for file, part in existing.parts.items() if file not in mend})


def another_source(destination: Path, what: str) -> BloomdeskError:
    """The error for a directory that already has parts of another source."""
    return BloomdeskError(
        f"{destination} was started from another source: it has {what}",
        "give a new directory",
    )


def check_form(destination: Path, existing: Manifest, form: str) -> None:
    """Raise `BloomdeskError` if the directory has parts of another form than `form`."""
    if existing.parts and existing.form != form:
        raise BloomdeskError(
            f"{destination} was started with --form {existing.form}, and a directory has one form",
            f"give --form {existing.form} to resume it, or give a new directory",
        )


def check_slice(destination: Path, existing: Manifest, own: Slice | None) -> None:
    """Raise `BloomdeskError` if the directory has parts of another slice than `own`."""
    if existing.parts and existing.slice != own:
        held = "all rows" if existing.slice is None else existing.slice.described
        raise BloomdeskError(
            f"{destination} was started with {held}, and a directory has the same rows of every matrix",
            f"to resume it: {existing.command(destination)}; or give a new directory",
        )


def dtype_to_resume(destination: Path, existing: Manifest | None, asked: str | None) -> Choice | None:
    """The dtype of the parts that the directory has, or None if it has none.

    Raises `BloomdeskError` if another one was `asked` for.
    """
    if existing is None or not existing.parts:
        return None
    dtype = existing.model.dtype
    if asked not in (None, dtype):
        raise BloomdeskError(
            f"{destination} was started in {dtype}, and a directory has one dtype",
            "leave out --dtype to resume it, or give a new directory",
        )
    return Choice(dtype, "as the directory was started")


def is_untied(existing: Manifest | None) -> bool:
    """Whether the directory has parts of a model whose head is not its embedding, which config.json may not say."""
    return existing is not None and bool(existing.parts) and not existing.model.tie_word_embeddings


def recorded_alone(existing: Manifest, companions: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of the small files that the directory has: a repair adds none."""
    return {name: data for name, data in companions.items() if name in existing.companions}


def drop_missing(destination: Path, manifest: Manifest) -> Manifest:
    """`manifest` with only the parts that are in place with the right size and header."""
    parts = manifest.parts.items()
    sound = {file: part for file, part in parts if is_in_place(destination / file, part.header, part.size)}
    return replace(manifest, parts=sound)


def missing_parts(manifest: Manifest) -> tuple[PartSpec, ...]:
    """The parts still to be made, in the order of a pass."""
    return tuple(spec for spec in manifest.specs if spec.file not in manifest.parts)


def read_companions(source: Path) -> dict[str, bytes]:
    """The bytes of a source's small files; optional ones only if it has them.

    They are copied byte for byte, so each must be what its name says, and a link must not lead out of the source or,
    in the Hub's cache (models--NAME/snapshots/COMMIT/FILE -> ../../blobs/HASH), out of the repo's folder: someone
    else's checkpoint could copy any file of the user's.
    """
    companions = {}
    for name in COMPANIONS:
        path = source / name
        if path.is_symlink():
            _refuse_foreign(path)
        data = read_small_file(path, LARGEST_COMPANION)
        if data is not None:
            check_companion(path, data)
            companions[name] = data
        elif name in REQUIRED_COMPANIONS:
            raise BloomdeskError(f"{path} is missing", COMPANION_AGAIN)
    return companions


def check_companion(path: Path, data: bytes) -> None:
    """Raise `BloomdeskError` if a small file's bytes are not what its name says."""
    kind = "JSON" if path.suffix == ".json" else "text in UTF-8"
    try:
        if kind == "JSON":
            json.loads(data)
        else:
            data.decode()
    except (ValueError, RecursionError):
        raise BloomdeskError(f"{path} is not {kind}", COMPANION_AGAIN) from None
    if path.name == TOKENIZER:
        from runner.model.tokenizer import parse_tokenizer  # of all commands, only two or three need it

        # The runner would refuse it hours later.
        parse_tokenizer(path, data, COMPANION_AGAIN)


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
    """Write the manifest and the small files; the manifest, which then records them.

    Raises `BloomdeskError` before anything is written if a small file is there that no manifest records.
    """
    records = dict(manifest.companions)
    for name, data in companions.items():
        path = destination / name
        if name not in manifest.companions and read_if_exists(path, LARGEST_COMPANION) not in (None, data):
            raise foreign_file(path)
        records[name] = CompanionRecord(name, len(data), xxhash.xxh3_128_hexdigest(data))
    write_manifest(destination, manifest)
    for name, data in companions.items():
        put_file(destination / name, data)
    manifest = replace(manifest, companions=records)
    write_manifest(destination, manifest)
    return manifest


def foreign_file(path: Path) -> BloomdeskError:
    """The error for a file in the place of one of ours that no manifest records."""
    return BloomdeskError(
        f"{path} is in the way: the manifest does not record it, and it is not what would be written there",
        "move it out of the directory and run the same command again",
    )


def write_manifest(destination: Path, manifest: Manifest) -> None:
    """Replace the manifest, then its backup, each as a whole."""
    data = manifest.to_json().encode()
    for name in (MANIFEST, MANIFEST_BACKUP):
        put_file(destination / name, data)


def put_file(path: Path, data: bytes) -> None:
    """Replace a small file as a whole, unless it already holds `data`."""
    with disk_errors(path):
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)


def require_free_space(
    destination: Path, needed: int, files: Iterable[str], companions: Mapping[str, bytes]
) -> None:
    """Raise `BloomdeskError` with the figures if the disk lacks space for `needed` bytes in `files`, and `companions`.

    What earlier runs left half-written of `files` counts as free: it is deleted before its replacement is written.
    Without `files` nothing is needed.
    """
    leftovers = [destination / (file + TEMPORARY_SUFFIX) for file in files]
    free = free_bytes(destination) + sum(path.stat().st_size for path in leftovers if path.is_file())
    needed += SPARE_BYTES + sum(map(len, companions.values()))
    if leftovers and needed > free:
        raise BloomdeskError(
            f"{destination} needs {needed:,} bytes and the disk has {free:,} free, {needed - free:,} too few",
            "free some space, or give a directory on a larger disk",
        )
