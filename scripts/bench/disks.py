"""A model on two disks beside the sum of their rates.

    python -m scripts.bench.disks --work WORK --like bloom-3b --json disks.json
    python -m scripts.bench.disks --work WORK --shape 14336,112,1,2000 --json disks.json

WORK gets images of ext4 file systems, loop-mounted, so each is a disk with a brake of its own; that takes root. For
each of `--rates` a checkpoint of random weights is spread over as many disks by shares of their rates, with `convert
--also`; the images stay for the next run. Each turn is a prompt of 16 tokens, then passes of one row, in a group
of its own, as scripts/bench/harness.py takes turns. Its RAM is so little that nearly all weights are streamed; what a
pass streams over its seconds is compared with the sum of the brakes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

from runner.estimate.forecast import weight_bytes
from runner.format.hyperparameters import Hyperparameters
from scripts.bench import harness, turns
from scripts.bench.harness import Benchmark, Column, Point, Row, Run, Turn
from scripts.bench.peers import forms
from scripts.bench.turns import CannotRun, Limits, numbers, size
from scripts.fakehub.checkpoint import TRUE_SHAPES, TRUE_VOCABULARY

PROMPT_TOKENS = 16
# On each disk.
FOLDER = "bloom"
SHARE = 10**6
# Of a file system, beside what it holds.
SPARE = 2**28
COLUMNS = (
    Column("disks, GB/s", "point"),
    Column("s/pass", "seconds"),
    Column("range of rounds", "rounds"),
    Column("streamed GB", "streamed_bytes", ".3f", 1e9),
    Column("GB/s", "rate", ".3f", 1e9),
    Column("sum of the brakes", "brakes", ".3f", 1e9),
    Column("share of it", "share", ".3f"),
    Column("waited s", "waiting"),
    Column("stays GB", "resident_bytes", ".3f", 1e9),
    Column("group's peak GB", "group_peak", ".2f", 1e9),
)


def options(parser: argparse.ArgumentParser) -> None:
    harness.add_like(parser)
    parser.add_argument(
        "--shape", type=numbers, metavar="HIDDEN,HEADS,BLOCKS,VOCABULARY", help="in place of --like"
    )
    parser.add_argument("--form", default="plain")
    parser.add_argument("--ram", type=size, default="1.5GB", metavar="SIZE")
    parser.add_argument(
        "--rates",
        type=pairs,
        default="0.4,0.4+0.4,0.4+0.2",
        metavar="GB/S+GB/S,...",
        help="of one disk or two",
    )
    parser.add_argument("--tokens", type=int, default=3, metavar="N", help="passes of one row in a turn")


def pairs(text: str) -> list[tuple[float, ...]]:
    """ "0.4,0.4+0.2" is one disk, then two, in bytes a second."""
    return [tuple(float(rate) * 1e9 for rate in each.split("+")) for each in text.split(",")]


def points(mounts: Mounts, given: argparse.Namespace, work: Path) -> tuple[Path, list[Point]]:
    """A point for each choice of disks."""
    shape = given.shape or (*TRUE_SHAPES[given.like], TRUE_VOCABULARY)
    nbytes = weight_bytes(Hyperparameters(shape[0], shape[1], shape[2], shape[3], "BF16"))
    turns.check_room(work, nbytes)
    disks = {
        rates: [
            mounts.disk(place_of(work, rates, index), round(nbytes * rate / sum(rates)))
            for index, rate in enumerate(rates)
        ]
        for rates in given.rates
    }
    if not all(forms.is_prepared(first / FOLDER) for first, *_ in disks.values()):
        forms.random_weights(work / "source", shape)
    found = [point(given, work, rates, mounted) for rates, mounted in disks.items()]
    shutil.rmtree(work / "source", ignore_errors=True)
    return found[0].form, found


def point(given: argparse.Namespace, work: Path, rates: Sequence[float], disks: Sequence[Path]) -> Point:
    """The checkpoint on disks of these rates, spread by shares of them."""
    first, *others = (disk / FOLDER for disk in disks)
    flags = [word for other in others for word in ("--also", str(other))]
    flags += ["--shares", ",".join(str(round(rate / SHARE)) for rate in rates)] if others else []
    made = forms.convert(work / "source", first, "--form", given.form, *flags)
    limits = Limits(int(given.ram), rates[0], tuple(zip(disks[1:], rates[1:], strict=True)))
    prompt = harness.prompt_of(made, PROMPT_TOKENS)
    command = harness.peer("one_row_passes", made, prompt, given.tokens + 1, given, limits)
    return Point(in_words(rates), command, limits, made, others=tuple(others))


def in_words(rates: Sequence[float]) -> str:
    """ "0.4+0.2", in GB a second."""
    return "+".join(f"{rate / 1e9:g}" for rate in rates)


def place_of(work: Path, rates: Sequence[float], index: int) -> Path:
    """Where a disk is mounted; its image is beside it."""
    return work / f"{in_words(rates).replace('.', '_')}-{index}"


class Mounts:
    """Disks of their own: images of file systems, mounted until the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Mounts:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def disk(self, place: Path, nbytes: int) -> Path:
        """A disk with room for `nbytes`, made if it is missing, and mounted at `place`.

        Raises `CannotRun` if that is impossible here.
        """
        image = place.with_suffix(".img")
        place.mkdir(parents=True, exist_ok=True)
        try:
            if not image.exists():
                with image.open("wb") as file:
                    file.truncate(nbytes + SPARE)
                _call("mkfs.ext4", "-q", "-m", "0", image)
            # Without direct reads of the image, the page cache below would answer in the disk's place.
            device = _call("losetup", "--find", "--show", "--direct-io=on", image).strip()
            self._stack.callback(_call, "losetup", "--detach", device)
            _call("mount", device, place)
            self._stack.callback(_call, "umount", place)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CannotRun(f"no disk could be made in {place}: {error}") from None
        return place


def _call(*command: object) -> str:
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def row(run: Run, point: Point, done: list[Turn], rows: list[Row]) -> Row:
    """Medians over the rounds of one choice of disks."""
    facts = harness.pass_facts(done)
    streamed = median(turn.report["streamed_bytes"] for turn in done)
    brakes = (point.limits.disk or 0) + sum(rate for _, rate in point.limits.also)
    return {
        **facts,
        "streamed_bytes": streamed,
        "rate": streamed / facts["seconds"],
        "brakes": brakes,
        "share": streamed / facts["seconds"] / brakes,
        "waiting": median(each for turn in done for each in turn.report["waiting_seconds"]),
        "resident_bytes": median(turn.report["resident_bytes"] for turn in done),
    }


def asked(given: argparse.Namespace) -> list[Limits]:
    """The limits of each choice of disks."""
    return [Limits(int(given.ram), rates[0]) for rates in given.rates]


def main() -> int:
    """The exit status."""
    with Mounts() as mounts:
        description = "A model on two disks beside the sum of their rates."
        made = partial(points, mounts)
        return harness.main(Benchmark("disks", description, options, made, row, COLUMNS, limits=asked))


if __name__ == "__main__":
    sys.exit(main())
