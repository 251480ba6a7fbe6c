"""The runner's commands; the only file of the runner that prints.

`generate` is for `python -m runner` and for the `bloomdesk` command, `bench` and `plan` are for the latter.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import BloomdeskError

if TYPE_CHECKING:
    from runner.cli.prompts import Prompt
    from runner.format.hyperparameters import Hyperparameters
    from runner.generation.decode import Generation
    from runner.generation.sequence import Sequence as TextSequence

INTERRUPTED = 130  # what shells report for a command ended by Ctrl-C
DEFAULT_NEW_TOKENS = 64
DEFAULT_SPECULATION = "lookup"
PROMPTS_HELP = (
    "A file of prompts in place of PROMPT: .txt, one a line, or .jsonl, an object with a prompt a line."
)
OUT_HELP = "Where the results of --prompts go, one JSON object a line; run it again to go on."
BATCH_HELP = "How many prompts may share a pass."
SPECULATE_HELP = "What proposes tokens, which changes none: lookup in the text so far, or off."
DRAFT_HELP = "A small prepared BLOOM with the same tokenizer, to propose tokens as well."
BENCH_TOKENS, BENCH_PROMPT_TOKENS = 4, 16


def generate(
    directory: Path,
    prompt: str | None,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    as_json: bool = False,
    ram: str | None = None,
    *,
    speculate: str = DEFAULT_SPECULATION,
    draft: Path | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    batch: int | None = None,
) -> int:
    """Print the greedy continuation of `prompt` as it grows, or one JSON object at the end; the exit status.

    With a file of `prompts` in place of it, JSON lines, to `out` where that is given. `ram` is a size like 12GB. Raises
    `BloomdeskError` for anything among these that can't be used.
    """
    if (prompt is None) == (prompts is None):
        raise BloomdeskError("give either a PROMPT or a file of --prompts, and not both")
    if prompts is not None:
        return _generate_all(directory, prompts, out, max_new_tokens, ram, batch, speculate, draft)
    if out is not None or batch is not None:
        raise BloomdeskError("--out and --batch are for a file of --prompts, and there is but one PROMPT")
    return _generate_one(directory, prompt, max_new_tokens, as_json, ram, speculate, draft)


def _generate_one(
    directory: Path,
    prompt: str,
    max_new_tokens: int,
    as_json: bool,
    ram: str | None,
    speculate: str,
    draft: Path | None,
) -> int:
    import runner
    from runner.cli import report as wording
    from runner.cli.terminal import Terminal
    from runner.generation.memory_plan import parse_size

    terminal = Terminal(sys.stdout, sys.stderr)
    model = runner.load(directory, parse_size(ram) if ram else None)
    generation = model.generate(
        prompt, max_new_tokens=max_new_tokens, speculate=speculate, draft=draft, on_part=terminal.note
    )
    _note(wording.chosen(generation.batch))
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
        text = model.tokenizer.decode(generation.ids)
        print(json.dumps({"prompt": prompt, **_report(generation, text, seconds)}, ensure_ascii=False))
    else:
        print()
        _note(wording.summary(generation, seconds))
    return status


def _report(found: Generation | TextSequence, text: str, seconds: float) -> dict[str, object]:
    tokens = len(found.ids)
    return {
        "prompt_token_ids": list(found.prompt_ids),
        "token_ids": found.ids,
        "text": text,
        "seconds_per_token": seconds / tokens if tokens else None,
        "passes": found.passes,
        "bytes_read": found.bytes_read,
        "stop_reason": found.stop_reason or "interrupted",
        "tokens_per_pass": tokens / found.passes if found.passes else None,
        "proposed": found.proposed,
        "accepted": found.accepted,
        "acceptance": found.accepted / found.proposed if found.proposed else None,
        "drafting_seconds": found.drafting_seconds,
    }


def _note(line: str) -> None:
    """A line for whoever sits at a terminal."""
    if sys.stderr.isatty():
        print(f"({line})", file=sys.stderr)


def _generate_all(
    directory: Path,
    prompts: Path,
    out: Path | None,
    max_new_tokens: int,
    ram: str | None,
    batch: int | None,
    speculate: str,
    draft: Path | None,
) -> int:
    from runner.cli.prompts import read_prompts
    from runner.cli.results import Results

    given = read_prompts(prompts)
    if out is None:
        write = _print_result
        return _run_all(directory, prompts, given, write, max_new_tokens, ram, batch, speculate, draft)
    with Results(out, given) as results:
        left = tuple(prompt for prompt in given if prompt.index not in results.done)
        if not left:
            _note(f"all {len(given)} prompts are done")
            return 0
        return _run_all(
            directory, prompts, left, results.append, max_new_tokens, ram, batch, speculate, draft
        )


def _print_result(index: int, result: Mapping[str, object]) -> None:
    print(json.dumps({"index": index, **result}, ensure_ascii=False), flush=True)


def _run_all(
    directory: Path,
    file: Path,
    prompts: Sequence[Prompt],
    write: Callable[[int, Mapping[str, object]], None],
    max_new_tokens: int,
    ram: str | None,
    batch: int | None,
    speculate: str,
    draft: Path | None,
) -> int:
    """Continue all these prompts, and `write` each result as soon as it is there; the exit status."""
    import runner
    from runner.cli import report as wording
    from runner.cli.terminal import StatusLine
    from runner.generation.memory_plan import parse_size
    from runner.generation.options import GenerationOptions

    model = runner.load(directory, parse_size(ram) if ram else None)
    requests = []
    for prompt in prompts:
        try:
            requests.append(model.request(prompt.text, prompt.max_new_tokens or max_new_tokens))
        except BloomdeskError as error:
            raise BloomdeskError(f"{file}, line {prompt.line}: {error.message}", error.hint) from error
    line, done = StatusLine(sys.stderr), 0

    def on_part(part: int, parts: int) -> None:
        counts = (
            f"{done} of {len(prompts)} prompts done, {running.active} in the batch, {running.waiting} waiting"
        )
        line.show(f"{counts} [part {part} of {parts}]")

    options = GenerationOptions(max_new_tokens, speculate, draft, batch)
    running = model.batch(requests, options, on_part)
    _note(wording.chosen(running))
    start = time.perf_counter()
    try:
        for found in running.run():
            prompt = prompts[found.index]
            named = {} if prompt.id is None else {"id": prompt.id}
            report = _report(found, model.tokenizer.decode(found.ids), found.seconds)
            line.clear()
            done += 1  # an interruption while it is made durable finds it written
            write(prompt.index, {**named, "prompt": prompt.text, **report})
    except KeyboardInterrupt:
        line.clear()
        print(f"interrupted: {done} of {len(prompts)} prompts are done", file=sys.stderr)
        return INTERRUPTED
    finally:
        line.clear()
    seconds = time.perf_counter() - start
    rate = f"{running.tokens / seconds:.3g} tokens a second"
    _note(f"{done} prompts, {running.tokens} tokens, {rate}, {wording.work(running)}")
    return 0


def bench(directory: Path, ram: str | None, tokens: int, prompt_tokens: int, as_json: bool = False) -> int:
    """Print what a few tokens took beside the least that they could; the exit status."""
    from runner.cli import report as wording
    from runner.cli.terminal import Terminal
    from runner.estimate import bench
    from runner.generation.memory_plan import parse_size

    terminal = Terminal(sys.stdout, sys.stderr)
    try:
        found = bench.bench(directory, parse_size(ram) if ram else None, tokens, prompt_tokens, terminal.note)
    finally:
        terminal.clear()
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        print_lines(wording.bench_lines(found))
    return 0


def print_lines(lines: Iterable[str]) -> None:
    """One after another, each as soon as it is there."""
    for line in lines:
        print(line)


def plan(
    directory: Path,
    ram: str | None,
    model: str | None,
    tokens: int,
    prompt_tokens: int,
    as_json: bool = False,
    space_to_prepare: Callable[[Hyperparameters], int] | None = None,
) -> int:
    """Print what to expect of a model on this machine; the exit status, 1 where the disk is too small for it."""
    from runner.cli import report as wording
    from runner.estimate import plan
    from runner.generation.memory_plan import parse_size

    found = plan.plan(directory, parse_size(ram) if ram else None, model, prompt_tokens, tokens)
    room = found.form.disk_bytes
    if found.name and space_to_prepare:
        room = space_to_prepare(found.model)
    fits = found.name is None or found.free_bytes >= room
    if as_json:
        print(json.dumps({**found.as_json(), "bytes_to_prepare": room, "fits": fits}))
    else:
        print_lines(wording.plan_lines(found, room, fits))
    return 0 if fits else 1


def main(arguments: list[str] | None = None) -> int:
    """`python -m runner DIR PROMPT`, or with --prompts: the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m runner", description="Generate from a prepared BLOOM checkpoint."
    )
    parser.add_argument("directory", type=Path, help="a prepared directory, as bloomdesk convert makes it")
    parser.add_argument("prompt", nargs="?", help="the text to continue")
    parser.add_argument(
        "--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--ram", metavar="SIZE", help="how much memory to use, like 12GB; default: what is free"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=PROMPTS_HELP)
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help=OUT_HELP)
    parser.add_argument(
        "--batch", type=int, metavar="N", help=f"{BATCH_HELP} Default: what the RAM suggests."
    )
    parser.add_argument("--speculate", default=DEFAULT_SPECULATION, metavar="HOW", help=SPECULATE_HELP)
    parser.add_argument("--draft", type=Path, metavar="DIR", help=DRAFT_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(arguments)
    return guarded(
        lambda: generate(
            options.directory,
            options.prompt,
            options.max_new_tokens,
            options.json,
            options.ram,
            speculate=options.speculate,
            draft=options.draft,
            prompts=options.prompts,
            out=options.out,
            batch=options.batch,
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
