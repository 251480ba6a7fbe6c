"""The command `generate`: one prompt, whose text is printed as it grows, or a file of prompts and one of results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from runner.cli import machines
from runner.cli.guard import note, status_after
from runner.cli.pass_status import PassStatus
from runner.cli.prompts import Prompt, name_of, read_prompt, read_prompts
from runner.cli.report import print_json
from runner.cli.terminal import StatusLine
from runner.errors import BloomdeskError
from runner.generation.options import GREEDY, OFF, GenerationOptions, Sampling, drawn_seed
from runner.system.lock import sole_writer
from runner.units import duration, number, rate, size

if TYPE_CHECKING:
    from runner.generation import Batch
    from runner.generation.model import Model
    from runner.generation.sequence import Request
    from runner.generation.sequence import Sequence as TextSequence

_ENDS = {
    "eos": "the model ended its text",
    "stop": "a stop text came",
    "grammar": "the output is complete",
    "length": "the limit of new tokens was reached",
}
Write = Callable[[int, Mapping[str, object]], None]


@dataclass(frozen=True)
class GenerateOptions:
    """What to generate: from one `prompt`, or a file of `prompts`, whose results go to `out`; `ram` is like "12GB".

    The prompt "-" is read from standard input, and that of a `prompt_file` from there. `also` are slices of a model
    on several disks that have moved.
    """

    directory: Path
    prompt: str | None = None
    prompt_file: Path | None = None
    prompts: Path | None = None
    out: Path | None = None
    ram: str | None = None
    as_json: bool = False
    session: Path | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    sampling: Sampling = GREEDY
    also: tuple[Path, ...] = ()
    # What all machines must have been asked, if there are several.
    asked: Mapping[str, object] = field(default_factory=dict)


@machines.awaited()
def generate(options: GenerateOptions) -> int:
    """Exit status, after the greedy tokens were printed as they grow, or as JSON.

    Raises `BloomdeskError` for options that cannot be used.
    """
    options = replace(options, asked=_asked(options))
    if machines.follows(options.directory):
        with _sole_user(options.session):
            return machines.follow(options.directory, options.ram, options.asked, options.session)
    given = [options.prompt, options.prompt_file, options.prompts]
    if sum(each is not None for each in given) != 1:
        raise BloomdeskError(
            "give a PROMPT, a --prompt-file or a file of --prompts, and one of them alone",
            'bloomdesk generate DST "The quick brown fox"; "-" reads the prompt from standard input',
        )
    if options.prompt == "-" or options.prompt_file is not None:
        options = replace(options, prompt=read_prompt(options.prompt_file), prompt_file=None)
    _name_contradictions(options)
    if options.sampling.logprobs is not None and options.prompts is None and not options.as_json:
        raise BloomdeskError("--logprobs has nowhere to go", "add --json")
    if options.session is not None and (options.prompts is not None or options.sampling.n > 1):
        raise BloomdeskError("a session is of one prompt and one continuation", "leave out --prompts and --n")
    if options.prompts is None:
        if options.out is not None or options.generation.batch is not None:
            raise BloomdeskError("--out and --batch are for a file of --prompts, and there is one PROMPT")
        seed = None
        if options.session is not None:
            from runner.generation.session import seed_of

            seed = seed_of(options.session)
        given_seed, options = options.sampling.seed, replace(options, sampling=options.sampling.seeded(seed))
        if given_seed is None and not options.as_json:
            _say_seed(options.sampling)
        if options.sampling.n > 1:
            show = _print_result if options.as_json else _print_choice
            return _generate_all(
                options, [Prompt(0, 1, options.prompt or "", sampling=options.sampling)], show
            )
        return _generate_one(options)
    given = read_prompts(options.prompts, options.sampling)
    if options.out is None:
        return _generate_shown(options, given)
    from runner.cli.results import Results, model_of, require_usable_name  # one prompt starts without it

    require_usable_name(options.out, options.prompts)
    with Results(options.out, given, model_of(options.directory, options.also)) as results:
        left = tuple(
            prompt for prompt in given if not prompt.choices <= results.done.get(prompt.index, set())
        )
        if not left:
            print(f"{options.out} has the results of all {len(given)} prompts", file=sys.stderr)
            if machines.are_several():
                with _opened(options):
                    pass  # which ends the others
            return 0
        # The seed that an interrupted run drew for all prompts without their own.
        without = [prompt for prompt in given if prompt.sampling.draws and prompt.sampling.seed is None]
        lines = [results.lines.get(prompt.index, {}) for prompt in without]
        if seeds := [line["seed"] for line in lines if "seed" in line]:
            left = tuple(replace(prompt, sampling=prompt.sampling.seeded(seeds[0])) for prompt in left)
        status = _generate_all(options, left, results.append, results.done)
        # A terminal has seen it already, and an interruption says what is done.
        if status in (0, 1) and not sys.stderr.isatty():
            whole = sum(prompt.choices <= results.done.get(prompt.index, set()) for prompt in given)
            print(f"{options.out} has the results of {whole} of {len(given)} prompts", file=sys.stderr)
        return status


def _asked(options: GenerateOptions) -> dict[str, object]:
    """What decides the text. Files may have another place on each machine."""
    changed = {name: each for name, each in asdict(options.sampling).items() if each != getattr(GREEDY, name)}
    return {
        "command": "generate",
        "PROMPT": options.prompt,
        "--max-new-tokens": options.generation.max_new_tokens,
        "--session": options.session is not None,
        **changed,
    }


def _generate_shown(options: GenerateOptions, prompts: Sequence[Prompt]) -> int:
    """Exit status, after the texts were printed: for people on a terminal, else as lines of JSON."""
    if options.as_json or not sys.stdout.isatty():
        return _generate_all(options, prompts, _print_result)
    if any(prompt.sampling.logprobs is not None for prompt in prompts):
        raise BloomdeskError("log-probabilities have nowhere to go", "add --json")
    if any(prompt.sampling.draws and prompt.sampling.seed is None for prompt in prompts):
        seed = drawn_seed()
        print(f"seed {seed}", file=sys.stderr)
        prompts = [replace(prompt, sampling=prompt.sampling.seeded(seed)) for prompt in prompts]
    return _generate_all(options, prompts, _print_text)


def _say_seed(sampling: Sampling) -> None:
    """Say with which seed a text can be had again, unless the last line says it."""
    if sampling.draws and (sampling.n > 1 or not sys.stderr.isatty()):
        print(f"seed {sampling.seed}", file=sys.stderr)


def _name_contradictions(options: GenerateOptions) -> None:
    """Say what is done of options that do not go together."""
    draft = options.generation.draft
    if draft is not None and options.generation.speculate == OFF:
        print(f"--speculate off leaves out n-grams alone: {draft} drafts", file=sys.stderr)
    if draft is not None and os.path.realpath(draft) == os.path.realpath(options.directory):
        print(
            f"{draft} is its own draft, which costs as much as it saves: "
            "give a smaller BLOOM, or its int4 form, which bloomdesk convert makes",
            file=sys.stderr,
        )


def _generate_one(options: GenerateOptions) -> int:
    with _opened(options) as model, _sole_user(options.session):
        requests = model.requests(options.prompt, options.generation.max_new_tokens, options.sampling)
        return _generate_text(options, model, requests)


@contextmanager
def _sole_user(session: Path | None) -> Iterator[None]:
    """Keep other processes from the session. Raises `BloomdeskError` if one has it.

    A directory that cannot be made is no session, as is said where it is to be written.
    """
    with ExitStack() as held:
        if session is not None:
            with suppress(OSError):
                session.mkdir(parents=True, exist_ok=True)
            if session.is_dir():
                held.enter_context(sole_writer(session))
        yield


def _generate_text(options: GenerateOptions, model: Model, requests: Sequence[Request]) -> int:
    from runner.generation.decode import Generation

    terminal = StatusLine(sys.stderr, sys.stdout)
    session = None
    if options.session is not None:
        session = model.session(options.session, requests[0], lambda text: print(text, file=sys.stderr))
        if session.restored:
            note(f"{session.restored} positions and {len(session.new_ids)} tokens are in {options.session}")
    status_of = PassStatus(lambda: model.weights.stream.traffic.bytes_read)

    def on_part(part: int, parts: int) -> None:
        terminal.show(*status_of.of(part, parts, generation.sequence.remaining))

    generation = model.batch(requests, options.generation, on_part, Generation, session)
    note(setup_line(generation))
    text = model.stream(generation.sequence)
    show = (lambda text: terminal.clear()) if options.as_json else terminal.write
    start = time.perf_counter()
    status = 0
    try:
        for token_id in generation:
            show(text.push(token_id))
    except KeyboardInterrupt as stop:
        status = status_after(stop)
    seconds = time.perf_counter() - start
    show(text.finish())
    if options.as_json:
        report = {"prompt": options.prompt, **_report(generation.sequence, model, seconds)}
        print_json(report)
    else:
        print()
        tokens = len(generation.ids)
        pace = f"{duration(seconds / tokens)} a token, " if tokens else ""
        end = _ENDS.get(generation.stop_reason or "", "interrupted")
        if generation.sequence.is_valid is False:
            end += " before the output was complete"
        note(f"{tokens} tokens, {pace}{_work(generation)}; {end}{_seed(options.sampling)}")
    return status


def _generate_all(
    options: GenerateOptions,
    prompts: Sequence[Prompt],
    write: Write,
    done: Mapping[int, Collection[int]] = MappingProxyType({}),
) -> int:
    """Exit status, after each continuation was written as soon as it was done; `done` are those that need none."""
    with _opened(options) as model:
        return _generate_all_with(model, options, prompts, write, done)


def _generate_all_with(
    model: Model,
    options: GenerateOptions,
    prompts: Sequence[Prompt],
    write: Write,
    done: Mapping[int, Collection[int]],
) -> int:
    requests, owners = [], []
    # One for all that have none of their own, so that it can be reported and given again.
    seed = drawn_seed() if options.sampling.seed is None else options.sampling.seed
    for prompt in prompts:
        count = prompt.max_new_tokens or options.generation.max_new_tokens
        try:
            found = model.requests(prompt.text, count, prompt.sampling.seeded(seed), prompt.index)
        except BloomdeskError as error:
            where = f"{name_of(options.prompts)}, line {prompt.line}: " if options.prompts else ""
            raise BloomdeskError(where + error.message, error.hint) from error
        left = [request for request in found if request.choice not in done.get(prompt.index, ())]
        requests += left
        owners += [prompt] * len(left)
    line, written, failed = StatusLine(sys.stderr), 0, 0

    def on_part(part: int, parts: int) -> None:
        counts = f"{written} of {len(requests)} {what} done"
        counts += f", {len(batch.active)} in the batch, {len(batch.waiting)} waiting"
        line.show(*(f"{counts} {status}" for status in status_of.of(part, parts)))

    what = "prompts" if len(requests) == len(prompts) else "continuations"
    status_of = PassStatus(lambda: model.weights.stream.traffic.bytes_read)
    batch = model.batch(requests, options.generation, on_part)
    note(setup_line(batch))
    start = time.perf_counter()
    try:
        for found in batch.run():
            prompt, sampling = owners[found.index], found.request.sampling
            if found.failure:
                line.clear()
                failed += 1
                _say_failure(found.failure, options, prompt)
                continue
            named = {} if prompt.id is None else {"id": prompt.id}
            if sampling.n > 1:
                named["choice"] = found.request.choice
            report = _report(found, model, found.seconds)
            line.clear()
            written += 1  # before it is written, since an interruption then finds it written
            write(prompt.index, {**named, "prompt": prompt.text, **report})
    except KeyboardInterrupt as stop:
        line.clear()
        print(f"interrupted: {written} of {len(requests)} {what} are done", file=sys.stderr)
        return status_after(stop)
    finally:
        line.clear()
    pace = f"{number(batch.tokens / (time.perf_counter() - start))} tokens a second"
    note(f"{written} {what}, {batch.tokens} tokens, {pace}, {_work(batch)}")
    return 1 if failed else 0


def _say_failure(failure: BloomdeskError, options: GenerateOptions, prompt: Prompt) -> None:
    """Name the prompt that got no text; the others of the batch go on."""
    where = f"{name_of(options.prompts)}, line {prompt.line}: " if options.prompts else ""
    print(BloomdeskError(where + failure.message, failure.hint).worded(), file=sys.stderr)


def _seed(sampling: Sampling) -> str:
    return f"; seed {sampling.seed}" if sampling.draws else ""


def _opened(options: GenerateOptions) -> AbstractContextManager[Model]:
    return machines.opened(options.directory, options.ram, options.asked, options.also)


def _print_result(index: int, result: Mapping[str, object]) -> None:
    print_json({"index": index, **result})


def _print_text(index: int, result: Mapping[str, object]) -> None:
    """A prompt with its text, for people."""
    choice = f".{result['choice']}" if "choice" in result else ""
    print(f"[{result.get('id', index)}{choice}] {result['prompt']}{result['text']}", flush=True)


def _print_choice(index: int, result: Mapping[str, object]) -> None:
    print(f"[{result['choice']}] {result['text']}", flush=True)


def _report(found: TextSequence, model: Model, seconds: float) -> dict[str, object]:
    from runner.generation.scoring import as_json

    tokens, sampling = len(found.ids), found.request.sampling
    return {
        "prompt_token_ids": list(found.prompt_ids),
        "token_ids": found.ids,
        "text": model.text(found),
        **({"seed": sampling.seed} if sampling.draws else {}),
        **({"logprobs": as_json(found.scores)} if sampling.logprobs is not None else {}),
        "seconds_per_token": seconds / tokens if tokens else None,
        "token_seconds": [round(each, 6) for each in found.token_seconds],
        "passes": found.passes,
        "bytes_read": found.bytes_read,
        "stop_reason": found.stop_reason or "interrupted",
        **({"valid": bool(found.is_valid)} if sampling.constraint else {}),
        "tokens_per_pass": tokens / found.passes if found.passes else None,
        "proposed": found.proposed,
        "accepted": found.accepted,
        "acceptance": found.accepted / found.proposed if found.proposed else None,
        "drafting_seconds": found.drafting_seconds,
        **machines.report(model),
    }


def setup_line(batch: Batch) -> str:
    """What the RAM and the options come to."""
    plan = batch.plan
    kept = "all weights stay"
    if plan.streamed_bytes:
        kept = (
            f"{size(plan.resident_bytes)} of weights stay, {size(plan.streamed_bytes)} are read in each pass"
        )
    if (draft := batch.proposer.draft) is not None:
        kept += f", and a draft of {size(plan.request.draft)}"
        kept += ", another form of the same model, which shares its KV cache" if draft.is_form else ""
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
