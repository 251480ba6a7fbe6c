"""The slices that directories on several disks get: by the shares that were given, recorded, or measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import BloomdeskError
from runner.format.slices import Slice
from runner.system.disk import existing_directory
from runner.units import rate

if TYPE_CHECKING:
    from toolkit.commands.placement import Placement


def placement_of(
    destination: Path, own: Slice | None, also: Sequence[Path], shares: Sequence[int]
) -> Placement:
    """Where the slices go. Without `shares` those of `also` are the recorded ones, or else the measured rates.

    Raises `BloomdeskError` for directories or shares that cannot be, and for a disk that can't be measured.
    """
    from toolkit.commands.placement import placed, recorded_shares

    if shares and own is None and not also:
        raise BloomdeskError(
            "--shares are for slices, and there is one directory with all rows",
            "give --also DIR for each further disk, or --slice 1/2 and so on",
        )
    placement = placed(destination, own, also, shares)
    if not also or shares:
        return placement
    return placed(destination, own, also, recorded_shares(placement.directories) or _measured(placement))


def _measured(placement: Placement) -> tuple[int, ...]:
    """Shares in proportion to what each disk gives while all of them are read."""
    from runner.estimate.rates import scratch_rates, shares_of

    found = scratch_rates([existing_directory(each) for each in placement.directories])
    shares = shares_of(found)
    given = ", ".join(f"{each} {rate(of)}" for each, of in zip(placement.directories, found, strict=True))
    print(f"the disks give together: {given}; so --shares {','.join(map(str, shares))}", file=sys.stderr)
    return shares
