"""Feed the readers damaged, forged and made-up files for any time.

    python -m scripts.torture.fuzz --minutes 10 [--reader zip] [--slow 2]

The readers take turns. A reader fails if it does anything but give a sound result or one clear error, or takes longer
than `--slow` seconds over one input; the smallest such input is printed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

from scripts.torture.mutations import READERS, Reader, check

# Inputs of one reader before the next one's turn.
ROUND = 500


class TooSlow(Exception):
    """A reader took too long over an input."""


def fuzz(reader: Reader, directory: Path, examples: int, slow: float) -> list[bool]:
    """Whether each of the inputs was taken; raises an unexpected error of the reader."""
    taken = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(data=reader.inputs())
    def run(data: bytes) -> None:
        start = time.process_time()
        taken.append(check(reader, directory, data))
        if time.process_time() - start > slow:
            raise TooSlow(f"{time.process_time() - start:.1f} s")

    run()
    return taken


def report(name: str, error: Exception, data: bytes) -> None:
    """Print the error of a reader and the input that caused it."""
    notes = "\n".join(getattr(error, "__notes__", []))[:2000]
    print(f"{name}: {type(error).__name__}: {str(error)[:500]}\n{notes}\ninput: {data[:2000]!r}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Fuzz the readers of files that others made.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all readers")
    parser.add_argument("--reader", choices=READERS, action="append", help="all readers without it")
    parser.add_argument("--slow", type=float, default=2.0, metavar="S", help="seconds for one input")
    options = parser.parse_args()
    taken: dict[str, list[bool]] = {name: [] for name in options.reader or READERS}
    failed, end = set(), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="bloomdesk-fuzz-") as scratch:
        for shard in ("a.bin", "b.bin"):
            (Path(scratch) / shard).touch()
        for name in itertools.cycle(taken):
            if time.monotonic() > end or len(failed) == len(taken):
                break
            if name not in failed:
                try:
                    taken[name] += fuzz(READERS[name], Path(scratch), ROUND, options.slow)
                except Exception as error:
                    report(name, error, (Path(scratch) / READERS[name].file).read_bytes())
                    failed.add(name)
    for name, results in taken.items():
        verdict = "FAILED" if name in failed else f"{sum(results):,} taken, the rest refused in one sentence"
        print(f"{name:>10}  {len(results):>9,} inputs: {verdict}")
    print(f"largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
