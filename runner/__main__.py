"""`python -m runner DIR PROMPT` generates without the toolkit; the `bloomdesk` command has all options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from runner.cli.generate import GenerateOptions, generate
from runner.cli.guard import Guard, empty_argument, end_process, require_current_directory
from runner.errors import BloomdeskError
from runner.generation.options import GenerationOptions


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(BloomdeskError(message, f"{self.prog} --help").worded(), file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the command."""
    guard = Guard()

    def command() -> int:
        parser = _parser()
        given = parser.parse_args(arguments)
        guard.debug = given.debug
        empty = empty_argument({"directory": given.directory, "--ram": given.ram})
        if empty is not None:
            parser.error(empty)
        generation = GenerationOptions(given.max_new_tokens)
        require_current_directory()
        return generate(
            GenerateOptions(
                Path(given.directory),
                given.prompt,
                ram=given.ram,
                as_json=given.json,
                generation=generation,
                also=tuple(map(Path, given.also)),
            )
        )

    return guard.run(command)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m runner", description="Generate from a prepared BLOOM checkpoint.")
    # A Path of "" would be the current directory.
    parser.add_argument("directory", help="a prepared directory")
    parser.add_argument("prompt", help="the text to continue")
    tokens = GenerationOptions.max_new_tokens
    parser.add_argument(
        "--max-new-tokens", type=int, default=tokens, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--ram", metavar="SIZE", help="RAM to use, like 12GB; default: what is free")
    parser.add_argument(
        "--also", action="append", default=[], metavar="DIR", help="a slice of it that has moved; repeatable"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    end_process(main)
