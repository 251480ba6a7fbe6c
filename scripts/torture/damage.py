"""Damage prepared files at random; every damage must be found by `verify` and mended by `repair`.

    python -m scripts.torture.damage --times 1000 [--seed 1] [--lossless]

The miniature is prepared once. Then, again and again: one bit flips, a file is cut off, or two files change places;
`verify` must name exactly the files concerned, and `repair` (from the source on disk, every tenth time from a local
hub) must bring back every byte.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections import Counter
from pathlib import Path

from scripts.fakehub.server import LocalHub
from scripts.torture.attempt import REPO, content, options, prepared, source_of
from toolkit.commands.build import carry_out
from toolkit.commands.repair import forget, plan_repair
from toolkit.commands.verify import verify

HUB_EVERY = 10


def flip(directory: Path, chance: random.Random) -> set[str]:
    """One bit of one file."""
    path = chance.choice(sorted(directory.iterdir()))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return {path.name}


def cut(directory: Path, chance: random.Random) -> set[str]:
    """The end of one file, or all of it."""
    path = chance.choice(sorted(directory.iterdir()))
    os.truncate(path, chance.choice((0, chance.randrange(path.stat().st_size))))
    return {path.name}


def swap(directory: Path, chance: random.Random) -> set[str]:
    """Two parts under each other's names."""
    one, other = chance.sample(sorted(directory.glob("*.safetensors")), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return {one.name, other.name} if first != second else set()


def mend(directory: Path, source: Path, from_hub: bool) -> None:
    """Repair as the command does."""
    known = forget(directory, verify(directory).damage, None if from_hub else source)
    carry_out(plan_repair(directory, known, None if from_hub else source))


def run(times: int, seed: int, work: Path, lossless: bool) -> Counter[str]:
    """Counts by kind of damage; raises AssertionError at the first that is not found or not mended."""
    chance, counts = random.Random(seed), Counter[str]()
    source, directory = source_of(work), work / "bloom"
    with LocalHub({REPO: source}) as hub:
        whole = prepared(hub, directory, lossless)
        for number in range(times):
            kind = chance.choice((flip, cut, swap))
            harmed = kind(directory, chance)
            found = {item.file for item in verify(directory).damage}
            assert found == harmed, (
                f"{kind.__name__} {number}: harmed {sorted(harmed)}, found {sorted(found)}"
            )
            mend(directory, source, from_hub=number % HUB_EVERY == 0)
            assert content(directory) == whole, f"{kind.__name__} {number} of {sorted(harmed)} was not mended"
            counts[kind.__name__] += 1
            if number % 100 == 99:
                print(f"{number + 1} damages, all found and mended: {dict(counts)}", flush=True)
    return counts


def main() -> None:
    given = options("damage", "Damage prepared files; find and mend every damage.", "--times", 1000)
    with tempfile.TemporaryDirectory() as work:
        counts = run(given.times, given.seed, Path(work), given.lossless)
    print(f"{sum(counts.values())} damages, all found and mended: {dict(counts)}")


if __name__ == "__main__":
    main()
