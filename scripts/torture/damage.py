"""Damage prepared files at random; every damage must be found by `verify` and mended by `repair`.

    python -m scripts.torture.damage --times 1000 [--seed 1] [--form int4]

The miniature is prepared once. Then, many times: one bit flips, a file is cut off, or two files are exchanged;
`verify` must name exactly the files concerned, and `repair` (from the source on disk, every tenth time from a local
hub) must bring back every byte.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

from scripts.fakehub.server import LocalHub
from scripts.torture.attempt import REPO, attack, content, prepared, source_of
from toolkit.commands.repair import repair
from toolkit.commands.verify import verify

HUB_EVERY = 10


def flip(directory: Path, chance: random.Random) -> set[str]:
    """The name of the file in which one bit was changed."""
    path = chance.choice(sorted(directory.iterdir()))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return {path.name}


def cut(directory: Path, chance: random.Random) -> set[str]:
    """The name of the file whose end, or all of it, was cut off."""
    path = chance.choice(sorted(directory.iterdir()))
    os.truncate(path, chance.choice((0, chance.randrange(path.stat().st_size))))
    return {path.name}


def swap(directory: Path, chance: random.Random) -> set[str]:
    """The names of two parts that were exchanged, if they differ."""
    one, other = chance.sample(sorted(directory.glob("*.safetensors")), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return {one.name, other.name} if first != second else set()


def run(times: int, seed: int, work: Path, form: str) -> Counter[str]:
    """Counts by kind of damage; raises AssertionError at the first that is not found or not mended."""
    chance, counts = random.Random(seed), Counter[str]()
    source, directory = source_of(work), work / "bloom"
    with LocalHub({REPO: source}) as hub:
        whole = prepared(hub, directory, form)
        for number in range(times):
            kind = chance.choice((flip, cut, swap))
            harmed = kind(directory, chance)
            damage = verify(directory).damage
            what, found = f"{kind.__name__} {number} of {sorted(harmed)}", {item.file for item in damage}
            assert found == harmed, f"{what}: found {sorted(found)}"
            repair_from = None if number % HUB_EVERY == 0 else source
            repair(directory, repair_from)
            assert content(directory) == whole, f"{what} was not mended"
            counts[kind.__name__] += 1
            if number % 100 == 99:
                print(f"{number + 1} damages, all found and mended: {dict(counts)}", flush=True)
    return counts


if __name__ == "__main__":
    attack(run, "Damage prepared files; find and mend every damage.", "--times", 1000)
