"""The directories that hold one checkpoint together: a whole one alone, or one for each slice.

The other slices are where the manifest of one says that they were made, or where somebody says that they are now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runner.errors import BloomdeskError, in_shell
from runner.format.digest import digest
from runner.format.layout import SPREADING
from runner.format.manifest import Manifest, UnsoundManifest, load_manifest
from runner.format.slices import even

# Of missing slices, in one sentence.
MOST_NAMED = 4


@dataclass(frozen=True)
class SliceSet:
    """Directories and their manifests in the order of their slices, of which some may not have been found.

    `first` is the one that was asked for, and has the index `asked` among all slices.
    """

    directories: Mapping[int, Path]
    manifests: Mapping[int, Manifest]
    asked: int

    @property
    def first(self) -> Manifest:
        return self.manifests[self.asked]

    @property
    def count(self) -> int:
        """Number of slices, found or not; 1 of a whole checkpoint."""
        return self.first.slice.count if self.first.slice is not None else 1

    @property
    def shares(self) -> tuple[int, ...]:
        """Those of all slices."""
        return self.first.slice.shares if self.first.slice is not None else even(1)

    @property
    def files(self) -> list[list[Path]]:
        """The parts that are there, of each directory."""
        places = zip(self.directories.values(), self.manifests.values(), strict=True)
        return [
            [path for file in manifest.parts if (path := directory / file).is_file()]
            for directory, manifest in places
        ]

    @property
    def missing(self) -> tuple[int, ...]:
        """Indices of the slices that were not found."""
        return tuple(index for index in range(self.count) if index not in self.directories)

    @property
    def fingerprint(self) -> str:
        """What distinguishes the weights of all slices together; of a complete set whose parts are all made."""
        known = [each.fingerprint for each in self.manifests.values() if each.fingerprint is not None]
        return known[0] if known else digest({"slices": [_hashes(each) for each in self.manifests.values()]})

    @property
    def source_fingerprint(self) -> str:
        """The same for all forms of one model; empty if slices do not know of which whole they were cut."""
        found = {each.source_fingerprint for each in self.manifests.values()}
        return (found.pop() or "") if len(found) == 1 else ""


def find_slices(directory: Path, also: Sequence[Path] = ()) -> SliceSet:
    """The directory and those that hold its other slices, looked for in `also` first, then where they were made.

    Raises `BloomdeskError` if `directory` or one of `also` has no sound manifest, or one of these belongs elsewhere, or
    if they are being spread.
    """
    refuse_while_spreading(directory)
    manifest = load_manifest(directory)
    if manifest.slice is None:
        if also:
            raise BloomdeskError(
                f"{directory} holds the whole checkpoint, and no slice of it", "leave out --also"
            )
        return SliceSet({0: directory}, {0: manifest}, 0)
    asked = manifest.slice.index
    found = {asked: (directory, manifest)}
    for each in also:
        other = load_manifest(each)
        _require_same(directory, manifest, each, other)
        index = other.slice.index if other.slice is not None else 0
        if index in found and found[index][1] != other:
            raise BloomdeskError(
                f"{each} holds the same slice as {found[index][0]}", "leave out one of the two"
            )
        found[index] = each, other
    for index, place in enumerate(map(Path, manifest.places)):
        if index not in found and (other := _found_at(place, manifest, index)) is not None:
            found[index] = place, other
    order = sorted(found)
    return SliceSet({i: found[i][0] for i in order}, {i: found[i][1] for i in order}, asked)


def own_slice(directory: Path) -> SliceSet:
    """The directory alone, if the other slices are on other machines. Raises `BloomdeskError` if a part is missing."""
    refuse_while_spreading(directory)
    manifest = load_manifest(directory)
    index = manifest.slice.index if manifest.slice is not None else 0
    found = SliceSet({index: directory}, {index: manifest}, index)
    _require_complete(found)
    return found


def find_all_slices(directory: Path, also: Sequence[Path] = ()) -> SliceSet:
    """A set without anything missing: no slice, and no part of one.

    Raises `BloomdeskError` with the next step if there is, and what `find_slices` raises.
    """
    found = find_slices(directory, also)
    require_all_slices(found)
    _require_complete(found)
    return found


def _require_complete(found: SliceSet) -> None:
    for index, manifest in found.manifests.items():
        if manifest.missing:
            raise BloomdeskError(
                f"{found.directories[index]} is not complete: {len(manifest.missing)} files are still to be made, "
                f"the next is {manifest.missing[0]}",
                f"{manifest.command(found.directories[index])} resumes where it stopped",
            )


def refuse_while_spreading(directory: Path) -> None:
    """Raise `BloomdeskError` if a command that spreads the directory over several disks has not ended."""
    if (directory / SPREADING).is_dir():
        begun, again = being_spread(directory), f"bloomdesk spread {in_shell(directory)} --also DIR"
        raise BloomdeskError(
            f"{directory} is being spread over several disks, and that has not ended",
            f"{begun.command_to_spread(directory) if begun else again} resumes where it stopped",
        )


def being_spread(directory: Path) -> Manifest | None:
    """The manifest of the slice that a directory will hold once it is spread; None if it is not being, or unsound."""
    if (directory / SPREADING).is_dir():
        for place in (directory / SPREADING, directory):
            with suppress(BloomdeskError):
                if (manifest := load_manifest(place)).slice is not None:
                    return manifest
    return None


def require_all_slices(found: SliceSet) -> None:
    """Raise `BloomdeskError` that says which slices were not found, and where they were made."""
    own, places = found.first.slice, found.first.places
    if not found.missing or own is None:
        return
    named = ", ".join(
        f"{index + 1}/{found.count}" + (f" (made in {places[index]})" if places else "")
        for index in found.missing[:MOST_NAMED]
    )
    more = f" and {len(found.missing) - MOST_NAMED} more" if len(found.missing) > MOST_NAMED else ""
    raise BloomdeskError(
        f"{found.directories[found.asked]} is {own.described} alone, and the others are needed: {named}{more}",
        "say where each of them is: --also DIR; if they are on other machines, start it on all with torchrun",
    )


def _found_at(place: Path, manifest: Manifest, index: int) -> Manifest | None:
    """The manifest of the slice at `index` if it is in `place` still, else None."""
    try:
        other = load_manifest(place)
    except UnsoundManifest:
        return None
    refuse_while_spreading(place)
    if other.slice is None or other.slice.index != index or difference(manifest, other):
        return None
    return other


def _require_same(directory: Path, manifest: Manifest, other_directory: Path, other: Manifest) -> None:
    if differs := difference(manifest, other):
        raise BloomdeskError(
            f"{other_directory} does not belong to {directory}: {differs}",
            f"see what each of them holds: bloomdesk info {in_shell(other_directory)}",
        )


def difference(one: Manifest, other: Manifest) -> str | None:
    """Why two manifests are not of slices of one checkpoint, in one form and of the same shares; None if they are."""
    if one.slice is None or other.slice is None:
        return "one of them holds the whole checkpoint"
    if one.slice.shares != other.slice.shares:
        return f"one is {one.slice.described}, the other {other.slice.described}"
    if one.form != other.form:
        return f"one is in the form {one.form}, the other in the form {other.form}"
    if one.model != other.model:
        return "their models have other hyperparameters"
    if one.source.repo and other.source.repo and one.source != other.source:
        sources = [f"{each.source.repo} at {each.source.commit}" for each in (one, other)]
        return f"one is of {sources[0]}, the other of {sources[1]}"
    for file in one.parts.keys() & other.parts.keys():
        if _differ(_shared(one, file), _shared(other, file)):
            return f"they were made from other weights, as {file} shows"
    return None


def _shared(manifest: Manifest, file: str) -> dict[tuple[str, str], str]:
    """The hashes of a part that all slices have in common, as far as known: of vectors, whole matrices, shards."""
    record = manifest.parts[file]
    found = {("shard", shard.file): shard.sha256 for shard in record.sources}
    found |= {("vector", each.name): each.xxh3_128 for each in record.weights if len(each.shape) == 1}
    found |= {("whole", each.name): each.xxh3_128 for each in record.wholes}
    return found


def _differ(one: Mapping[tuple[str, str], str], other: Mapping[tuple[str, str], str]) -> bool:
    return any(one[name] != other[name] for name in one.keys() & other.keys())


def _hashes(manifest: Manifest) -> list[str]:
    return [tensor.xxh3_128 for part in manifest.parts.values() for tensor in part.weights]
