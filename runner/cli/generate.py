"""The command `generate`: one prompt, whose text is printed as it grows, or a file of prompts and one of results."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from runner.cli.guard import note, status_after
from runner.cli.prompts import Prompt, read_prompts
from runner.cli.terminal import StatusLine
from runner.errors import BloomdeskError
from runner.generation.options import GenerationOptions
from runner.units import duration, number, parse_size, rate, size

if TYPE_CHECKING:
    from runner.generation import Batch
    from runner.generation.decode import Generation
    from runner.generation.model import Model
    from runner.generation.sequence import Sequence as TextSequence

_ENDS = {"eos": "the model ended its text", "length": "the limit of new tokens was reached"}
Write = Callable[[int, Mapping[str, object]], None]


@dataclass(frozen=True)
class GenerateOptions:
    """What to generate: from one `prompt`, or a file of `prompts`, whose results go to `out`; `ram` is like "12GB"."""

    directory: Path
    prompt: str | None = None
    prompts: Path | None = None
    out: Path | None = None
    ram: str | None = None
    as_json: bool = False
    generation: GenerationOptions = field(default_factory=GenerationOptions)


def generate(options: GenerateOptions) -> int:
    """Exit status, after the greedy tokens were printed as they grow, or as JSON.

    Raises `BloomdeskError` for options that cannot be used.
    """
    if (options.prompt is None) == (options.prompts is None):
        raise BloomdeskError("give either a PROMPT or a file of --prompts, and not both")
    if options.prompts is None:
        if options.out is not None or options.generation.batch is not None:
            raise BloomdeskError("--out and --batch are for a file of --prompts, and there is one PROMPT")
        return _generate_one(options)
    given = read_prompts(options.prompts)
    if options.out is None:
        return _generate_all(options, given, _print_result)
    from runner.cli.results import Results  # one prompt starts without it

    with Results(options.out, given) as results:
        left = tuple(prompt for prompt in given if prompt.index not in results.done)
        if not left:
            note(f"all {len(given)} prompts are done")
            return 0
        return _generate_all(options, left, results.append)


def _generate_one(options: GenerateOptions) -> int:
    from runner.generation.decode import Generation

    terminal = StatusLine(sys.stderr, sys.stdout)
    model = _opened(options)
    request = model.request(options.prompt, options.generation.max_new_tokens)
    generation = model.batch([request], options.generation, terminal.show_part, Generation)
    note(_setup(generation))
    stream = model.tokenizer.stream()
    show = (lambda text: terminal.clear()) if options.as_json else terminal.write
    start = time.perf_counter()
    status = 0
    try:
        for token_id in generation:
            show(stream.push(token_id))
    except KeyboardInterrupt as stop:
        status = status_after(stop)
    seconds = time.perf_counter() - start
    show(stream.finish())
    if options.as_json:
        text = model.tokenizer.decode(generation.ids)
        report = {"prompt": options.prompt, **_report(generation, text, seconds)}
        print(json.dumps(report, ensure_ascii=False))
    else:
        print()
        tokens = len(generation.ids)
        pace = f"{duration(seconds / tokens)} a token, " if tokens else ""
        end = _ENDS.get(generation.stop_reason or "", "interrupted")
        note(f"{tokens} tokens, {pace}{_work(generation)}; {end}")
    return status


def _generate_all(options: GenerateOptions, prompts: Sequence[Prompt], write: Write) -> int:
    """Exit status, after each prompt's result was written as soon as it was done."""
    model = _opened(options)
    requests = []
    for prompt in prompts:
        count = prompt.max_new_tokens or options.generation.max_new_tokens
        try:
            requests.append(model.request(prompt.text, count))
        except BloomdeskError as error:
            where = f"{options.prompts}, line {prompt.line}"
            raise BloomdeskError(f"{where}: {error.message}", error.hint) from error
    line, done = StatusLine(sys.stderr), 0

    def on_part(part: int, parts: int) -> None:
        counts = f"{done} of {len(prompts)} prompts done"
        counts += f", {len(batch.active)} in the batch, {len(batch.waiting)} waiting"
        line.show_part(part, parts, counts)

    batch = model.batch(requests, options.generation, on_part)
    note(_setup(batch))
    start = time.perf_counter()
    try:
        for found in batch.run():
            prompt = prompts[found.index]
            named = {} if prompt.id is None else {"id": prompt.id}
            report = _report(found, model.tokenizer.decode(found.ids), found.seconds)
            line.clear()
            done += 1  # before it is written, since an interruption then finds it written
            write(prompt.index, {**named, "prompt": prompt.text, **report})
    except KeyboardInterrupt as stop:
        line.clear()
        print(f"interrupted: {done} of {len(prompts)} prompts are done", file=sys.stderr)
        return status_after(stop)
    finally:
        line.clear()
    pace = f"{number(batch.tokens / (time.perf_counter() - start))} tokens a second"
    note(f"{done} prompts, {batch.tokens} tokens, {pace}, {_work(batch)}")
    return 0


def _opened(options: GenerateOptions) -> Model:
    import runner

    return runner.load(options.directory, parse_size(options.ram) if options.ram else None)


def _print_result(index: int, result: Mapping[str, object]) -> None:
    print(json.dumps({"index": index, **result}, ensure_ascii=False), flush=True)


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


def _setup(batch: Batch) -> str:
    """What the RAM and the options come to."""
    plan = batch.plan
    kept = "all weights stay"
    if plan.streamed_bytes:
        kept = (
            f"{size(plan.resident_bytes)} of weights stay, {size(plan.streamed_bytes)} are read in each pass"
        )
    return (
        f"RAM {size(plan.request.ram)}: {kept}; batch {plan.request.batch}; speculation {batch.proposer.words}; "
        "set them with --ram, --batch, --speculate"
    )


def _work(batch: Batch) -> str:
    """Passes, the weights that they read, and the draft tokens that they accepted."""
    traffic = batch.model.weights.stream.traffic
    text = f"{size(batch.bytes_read)} of weights read in {batch.passes} passes"
    if traffic.reading_seconds:
        text += f" at {rate(traffic.bytes_read / traffic.reading_seconds)}"
    if batch.proposed:
        text += f", {number(batch.tokens / batch.passes)} tokens a pass, "
        text += f"{batch.accepted} of {batch.proposed} draft tokens accepted"
    if batch.drafting_seconds:
        text += f", {duration(batch.drafting_seconds)} of drafting"
    return text
