"""`bloomdesk serve` with a pass that lasts: each of its parts waits before it is computed.

python -m scripts.bench.slow_server SECONDS serve DST ...
"""

from __future__ import annotations

import sys
import time

from runner.generation.model import Model
from runner.model import bloom
from toolkit.cli import app


def main() -> None:
    """Run the command with passes of about the seconds that are given first."""
    seconds = float(sys.argv.pop(1))
    compute, count = bloom.block_forward, [1]

    def slowly(*arguments: object) -> object:
        time.sleep(seconds / count[0])
        return compute(*arguments)

    open_model = Model.open.__func__

    def opened(cls: type[Model], *arguments: object) -> Model:
        found = open_model(cls, *arguments)
        count[0] = found.weights.model.n_layer
        return found

    bloom.block_forward, Model.open = slowly, classmethod(opened)
    app.main()


if __name__ == "__main__":
    main()
