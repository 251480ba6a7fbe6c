"""Which directory gets which slice of a checkpoint: one directory all of it or one slice, or several a slice each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from runner.errors import BloomdeskError
from runner.format.layout import SPREADING
from runner.format.manifest import Manifest
from runner.format.slices import Slice, even
from toolkit.parts import destination as target


@dataclass(frozen=True)
class Placement:
    """The slice of each directory, in order; None if the only one gets all rows.

    `places` are what the manifests of several say of where all of them are.
    """

    slices: Mapping[Path, Slice | None]
    places: tuple[str, ...] = ()

    @property
    def directories(self) -> tuple[Path, ...]:
        return tuple(self.slices)

    @property
    def shares(self) -> tuple[int, ...]:
        """Those of all slices; none of a directory that gets all rows."""
        own = next(iter(self.slices.values()))
        return own.shares if own is not None else ()

    @property
    def is_whole(self) -> bool:
        """Whether these directories hold the whole checkpoint together."""
        return all(own is None or own.count == len(self.slices) for own in self.slices.values())

    def manifest(self, directory: Path, fresh: Manifest) -> Manifest:
        """The manifest `fresh` of the whole checkpoint as the directory begins with it."""
        return replace(fresh, slice=self.slices[directory], places=self.places)


def placed(
    destination: Path, own: Slice | None = None, also: Sequence[Path] = (), shares: Sequence[int] = ()
) -> Placement:
    """The directory `destination` alone, with its slice if it gets one, or beside those of `also` the first of several.

    Without `shares` all have the same. Raises `BloomdeskError` if one is given twice, or there are other shares.
    """
    if not also:
        return Placement({destination: own})
    directories = (destination, *also)
    if own is not None:
        raise BloomdeskError(
            "--slice is for one directory, and --also for all of them", "give one of the two"
        )
    if len({os.path.realpath(each) for each in directories}) < len(directories):
        raise BloomdeskError("a directory is given twice", "give each slice a directory of its own")
    shares = tuple(shares) or even(len(directories))
    if len(shares) != len(directories):
        raise BloomdeskError(
            f"there are {len(shares)} shares for {len(directories)} directories",
            "give one for each of them: --shares 2,1,...",
        )
    places = tuple(str(each.absolute()) for each in directories)
    return Placement({each: Slice(index, shares) for index, each in enumerate(directories)}, places)


def recorded_shares(directories: Sequence[Path]) -> tuple[int, ...]:
    """The shares of a directory among these that is begun, or is being spread; none if all of them are new."""
    for directory in (*directories, *(each / SPREADING for each in directories)):
        existing = target.load_existing(directory)
        own = existing.slice if existing is not None else None
        if own is not None and own.count == len(directories):
            return own.shares
    return ()


def resumed(directory: Path, existing: Manifest | None) -> Placement:
    """That of a directory that is there, for itself alone."""
    return Placement({directory: existing.slice if existing is not None else None})
