"""Feed the readers damaged, forged and made-up files for as long as one likes.

    python -m scripts.torture.fuzz --minutes 10 [--reader zip] [--slow 2]

The readers take turns. Ends with 1 and the bytes of the smallest input that it could find where a reader does
anything but give a sound result or one clear error, or takes longer than `--slow` seconds over one input.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings

from scripts.torture.mutations import READERS, Reader, check

ROUND = 2000  # inputs of one reader before the next has its turn


class TooSlow(Exception):
    """A reader took its time over an input."""


def fuzz(reader: Reader, directory: Path, examples: int, slow: float) -> list[bool]:
    """Whether each of the inputs was taken; raises what the reader should not."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the readers of files that others made.")
    parser.add_argument("--minutes", type=float, default=10.0, help="in all (default: 10)")
    parser.add_argument("--reader", choices=READERS, action="append", help="default: all, in turns")
    parser.add_argument(
        "--slow", type=float, default=2.0, metavar="S", help="seconds for one input (default: 2)"
    )
    parser.add_argument(
        "--round", type=int, default=ROUND, metavar="N", help="inputs of a turn (default: 2000)"
    )
    options = parser.parse_args()
    names = options.reader or list(READERS)
    counts = {name: [0, 0] for name in names}
    end = time.monotonic() + 60 * options.minutes
    failed = []
    with tempfile.TemporaryDirectory(prefix="bloomdesk-fuzz-") as scratch:
        for shard in ("a.bin", "b.bin"):
            (Path(scratch) / shard).write_bytes(b"")
        while time.monotonic() < end and len(failed) < len(names):
            for name in names:
                if name in failed or time.monotonic() > end:
                    continue
                try:
                    taken = fuzz(READERS[name], Path(scratch), options.round, options.slow)
                except Exception as error:
                    last = (Path(scratch) / READERS[name].file).read_bytes()
                    notes = "\n".join(getattr(error, "__notes__", []))
                    print(
                        f"{name}: {type(error).__name__}: {str(error)[:500]}\n{notes[:2000]}\ninput: {last[:2000]!r}"
                    )
                    failed.append(name)
                    continue
                counts[name][0] += len(taken)
                counts[name][1] += sum(taken)
    for name, (inputs, taken) in counts.items():
        verdict = "FAILED" if name in failed else f"{taken:,} taken, the rest refused in one sentence"
        print(f"{name:>10}  {inputs:>9,} inputs: {verdict}")
    print(f"largest memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
