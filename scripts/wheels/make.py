"""`python -m scripts.wheels.make OUT`: a wheel for each system, unpacked and checked."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from runner.kernel import compiler
from scripts.wheels.build import ROOT, build_wheel, workshop
from scripts.wheels.check import faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the wheels")
    parser.add_argument(
        "--target", action="append", choices=compiler.TARGETS, help="only this one; may be repeated"
    )
    options = parser.parse_args()
    private = [str(ROOT), str(Path.home()), tempfile.gettempdir()]
    wrong = 0
    with workshop() as place:
        for target in options.target or compiler.TARGETS:
            wheel = build_wheel(place, target, options.out)
            found = faults(wheel, target, private)
            said = "; ".join(found) or "sound"
            print(f"{target:15} {wheel.stat().st_size / 1e6:.2f} MB  {wheel.name}  {said}", flush=True)
            wrong += len(found)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
