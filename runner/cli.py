"""`generate`, for `python -m runner` and for the `bloomdesk` command; the only file of the runner that prints."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import BloomdeskError

if TYPE_CHECKING:
    from runner.decode import Generation

INTERRUPTED = 130  # what shells report for a command ended by Ctrl-C
DEFAULT_NEW_TOKENS = 64


def generate(
    directory: Path,
    prompt: str,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    as_json: bool = False,
    ram: str | None = None,
) -> int:
    """Print the greedy continuation of `prompt` as it grows, or one JSON object at the end; the exit status.

    `ram` is a size like 12GB. Raises `BloomdeskError` for a directory, a prompt or a size that can't be used.
    """
    import runner
    from runner.budget import parse_size
    from runner.terminal import Terminal

    terminal = Terminal(sys.stdout, sys.stderr)
    model = runner.load(directory, parse_size(ram) if ram else None)
    generation = model.generate(prompt, max_new_tokens=max_new_tokens, on_part=terminal.note)
    stream = model.tokenizer.stream()
    show = (lambda text: terminal.clear()) if as_json else terminal.write
    start = time.perf_counter()
    status = 0
    try:
        for token_id in generation:
            show(stream.push(token_id))
    except KeyboardInterrupt:
        status = INTERRUPTED
    seconds = time.perf_counter() - start
    show(stream.finish())
    if as_json:
        report = _report(prompt, generation, model.tokenizer.decode(generation.ids), seconds, bool(status))
        print(json.dumps(report, ensure_ascii=False))
    else:
        print()
        _summarise(generation, seconds)
    return status


def _report(
    prompt: str, generation: Generation, text: str, seconds: float, interrupted: bool
) -> dict[str, object]:
    return {
        "prompt": prompt,
        "prompt_token_ids": generation.prompt_ids,
        "token_ids": generation.ids,
        "text": text,
        "seconds_per_token": seconds / len(generation.ids) if generation.ids else None,
        "passes": generation.passes,
        "bytes_read": generation.bytes_read,
        "streamed_bytes_per_pass": generation.streamed_bytes_per_pass,
        "stop_reason": "interrupted" if interrupted else generation.stop_reason,
    }


def _summarise(generation: Generation, seconds: float) -> None:
    if not sys.stderr.isatty():
        return
    tokens = len(generation.ids)
    pace = f"{seconds / tokens:.3g} s a token, " if tokens else ""
    reason = {"eos": "the model ended its text", "length": "the limit of new tokens was reached"}
    end = reason.get(generation.stop_reason or "", "interrupted")
    read = f"{generation.bytes_read / 1e9:,.1f} GB of weights read in {generation.passes} passes"
    if generation.disk_rate:
        read += f" at {generation.disk_rate / 1e9:,.2f} GB/s"
    print(f"({tokens} tokens, {pace}{read}; {end})", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """`python -m runner DIR PROMPT`: the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m runner", description="Generate from a prepared BLOOM checkpoint."
    )
    parser.add_argument("directory", type=Path, help="a prepared directory, as bloomdesk convert makes it")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--ram", metavar="SIZE", help="how much memory to use, like 12GB; default: what is free"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    return guarded(
        lambda: generate(
            options.directory, options.prompt, options.max_new_tokens, options.json, options.ram
        ),
        debug=options.debug,
    )


def guarded(command: Callable[[], int], *, debug: bool, failure: int = 1) -> int:
    """Run a command; its exit status, or `failure` after one clear sentence in place of a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a character that the terminal can't show is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    try:
        return command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone; nothing more can be said, also not by the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failure
    except Exception as error:
        if debug:
            raise
        if not isinstance(error, BloomdeskError):
            error = BloomdeskError(
                f"unexpected {type(error).__name__}: {error}",
                "run it again with --debug for the traceback, and report it",
            )
        print(error.worded(), file=sys.stderr)
        return failure
