"""What a grammar may cost: llguidance's limits, and a check in a process of its own, which can be ended.

A JSON schema of 1 kB, such as an `allOf` of patterns, can take llguidance hours and all of the RAM: it compares regular
expressions before any of its limits holds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

# A tenth of a second or so for most grammars, and minutes at most; 10,000 texts of an enum are within it.
# llguidance's own million lets 30,000 properties take ten minutes.
LEXER_FUEL = 200_000


def limits(library: Any) -> Any:
    """The limits for llguidance, the module `library`."""
    # Without the parser's whole state in the text of an error.
    return library.LLParserLimits(initial_lexer_fuel=LEXER_FUEL, verbose_errors=False)


def reason_in_time(source: str, seconds: float) -> str:
    """Why llguidance cannot compile a grammar within `seconds`; empty if it can."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(
            command, input=source.encode(), capture_output=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"it takes longer than {seconds:g} s to compile"
    return done.stdout.decode() or (
        f"its check ends with status {done.returncode}" if done.returncode else ""
    )


def _main() -> None:
    """Write why the grammar on standard input cannot be compiled."""
    import llguidance

    source = sys.stdin.buffer.read().decode()
    try:
        reason = llguidance.LLMatcher.validate_grammar(source, limits=limits(llguidance))
    except BaseException as error:
        # A panic is no Exception.
        reason = str(error)
    sys.stdout.buffer.write(reason.encode())


if __name__ == "__main__":
    _main()
