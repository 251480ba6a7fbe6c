"""A model on two disks beside the sum of their rates.

    python -m scripts.bench.disks --work WORK --like bloom-3b --json disks.json
    python -m scripts.bench.disks --work WORK --shape 14336,112,1,2000 --json disks.json

WORK gets images of two ext4 file systems, loop-mounted, so each is a disk with a brake of its own; that takes root. The
checkpoint of random weights is spread over them for each pair of rates in `--rates`, by shares of these rates, with
`convert --also`; "0.4" is the first disk alone. Each turn is a prompt of 16 tokens, then passes of one row, in a
control group of its own, as scripts/bench/harness.py takes turns. Its RAM is so little that nearly all weights are
streamed; what a pass streams over its seconds is compared with the sum of the brakes.
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
    """A point for each choice of disks, of which each is made anew."""
    shape = given.shape or (*TRUE_SHAPES[given.like], TRUE_VOCABULARY)
    model = Hyperparameters(shape[0], shape[1], shape[2], shape[3], "BF16")
    each = weight_bytes(model)
    turns.check_room(work, 2 * each + len(given.rates) * (each + 2 * SPARE))
    source = forms.random_weights(work / "source", shape)
    found, prompt = [], None
    for number, rates in enumerate(given.rates):
        disks = [
            mounts.disk(work / f"{number}-{disk}", round(each * rate / sum(rates)))
            for disk, rate in enumerate(rates)
        ]
        first, *others = (disk / "bloom" for disk in disks)
        made = spread(source, first, others, rates, given.form)
        prompt = prompt or harness.prompt_of(made, PROMPT_TOKENS)
        limits = Limits(int(given.ram), rates[0], tuple(zip(disks[1:], rates[1:], strict=True)))
        command = harness.peer("one_row_passes", made, prompt, given.tokens + 1, given, limits)
        name = "+".join(f"{rate / 1e9:g}" for rate in rates)
        found.append(Point(name, command, limits, made, others=tuple(others)))
    shutil.rmtree(work / "source")
    return found[0].form, found


def spread(source: Path, first: Path, others: Sequence[Path], rates: Sequence[float], form: str) -> Path:
    """The checkpoint on these disks, by shares of their rates."""
    flags = ["--form", form]
    if others:
        flags += [word for other in others for word in ("--also", str(other))]
        flags += ["--shares", ",".join(str(round(rate / SHARE)) for rate in rates)]
    return forms.convert(source, first, *flags)


class Mounts:
    """Disks of their own: images of file systems, mounted until the end."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Mounts:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def disk(self, place: Path, nbytes: int) -> Path:
        """A new disk with room for `nbytes`, mounted at `place`. Raises `CannotRun` if that is impossible here."""
        image = place.with_suffix(".img")
        place.mkdir(parents=True, exist_ok=True)
        try:
            with image.open("wb") as file:
                file.truncate(nbytes + SPARE)
            self._stack.callback(image.unlink, missing_ok=True)
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
