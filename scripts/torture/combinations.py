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
import itertools
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import (
    ExitStack,
)
from pathlib import Path

from runner.format.coded import LOSSLESS, PLAIN
from runner.format.quantised import INT4_FORM
from scripts.fakehub.server import LocalHub
from scripts.torture.trial import Command, Trial
from scripts.torture.world import (
    REPOS,
    STATES,
    World,
    make_world,
    scratch,
)

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


def commands() -> Iterator[Command]:
    """Every command, with every kind of source that it can have."""
    for source in (*SOURCES, "typo"):
        for form, delete in itertools.product((PLAIN, LOSSLESS, INT4_FORM), ((), ("--delete-source",))):
            yield Command(("convert", "SRC", "DST", "--form", form, *delete), source)
        yield Command(("repair", "DST", "--source", "SRC"), source)
    for repo in (*REPOS, "down"):
        name = "me/a" if repo == "down" else repo
        yield Command(("prepare", name, "DST"), repo=repo)
        for form in (LOSSLESS, INT4_FORM):
            yield Command(("prepare", name, "DST", "--form", form), repo=repo)
        yield Command(("download", name, "DST"), repo=repo)
        yield Command(("download", name, "DST", "--check"), repo=repo)
    for repo in ("me/a", "down"):
        yield Command(("repair", "DST"), repo=repo)
    for form in (LOSSLESS, INT4_FORM):
        yield Command(("convert", "PREPARED", "DST", "--form", form))
        yield Command(("convert", "DST", "NEW", "--form", form))
    for slice_ in (("--slice", "1/2"), ("--also", "ALSO")):
        yield Command(("convert", "SRC", "DST", *slice_, "--shares", "2,1"), "a")
    yield Command(("prepare", "me/a", "DST", "--slice", "1/2", "--shares", "2,1"), repo="me/a")
    yield Command(("spread", "DST", "--also", "ALSO", "--shares", "2,1"))
    yield Command(("spread", "DST", "--also", "ALSO", "--also", "NEW", "--shares", "2,1,1"))
    yield Command(("export", "PREPARED", "DST"))
    yield Command(("export", "DST", "NEW"))
    yield Command(("verify", "DST"))
    yield Command(("verify", "DST", "--quick"))


def combinations() -> list[tuple[str, Command]]:
    """Every state with every command."""
    return list(itertools.product(STATES, commands()))


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
