"""The `bloomdesk` command; the only file of the toolkit that prints. Heavy imports wait inside the commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runner.cli import (
    BATCH_HELP,
    BENCH_PROMPT_TOKENS,
    BENCH_TOKENS,
    DEFAULT_NEW_TOKENS,
    DEFAULT_SPECULATION,
    DRAFT_HELP,
    OUT_HELP,
    PROMPTS_HELP,
    SPECULATE_HELP,
    guarded,
)
from runner.cli import bench as run_bench
from runner.cli import generate as run_generation
from runner.cli import plan as run_plan
from runner.errors import BloomdeskError
from runner.prepared import LOSSLESS, PLAIN

if TYPE_CHECKING:
    from toolkit.download import Plan
    from toolkit.info import Info
    from toolkit.prepare import PreparationPlan
    from toolkit.terminal import WorkProgress
    from toolkit.verify import VerifyReport

app = typer.Typer(
    help="Run BLOOM-176B, or any smaller BLOOM, on a desktop: prepare the checkpoint once, then generate from disk.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # drawing boxes costs more than all the rest of --help
    pretty_exceptions_enable=False,
)

Repo = Annotated[
    str, typer.Argument(metavar="REPO", help="A BLOOM or BLOOMZ on the Hub, as bigscience/bloom.")
]
Prepared = Annotated[Path, typer.Argument(metavar="DST", help="A prepared directory.")]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="R", help="Branch, tag or commit; for bigscience/bloom the pinned commit if left out."
    ),
]
Connections = Annotated[
    int, typer.Option(metavar="N", min=1, max=32, help="Ranges of a file that are fetched at a time.")
]
DEFAULT_CONNECTIONS = 8
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless", help="Store bfloat16 weights coded: two thirds of the bytes, the very same bits."
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="How much memory to use, like 12GB.", show_default="what is free"),
]
PromptTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    context.obj = debug


def finish(context: typer.Context, command: Callable[[], int], failure: int = 1) -> None:
    """Run a command's body and end with its exit status."""
    raise typer.Exit(guarded(command, debug=context.obj, failure=failure))


@app.command()
def download(
    context: typer.Context,
    repo: Repo,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it.")],
    revision: Revision = None,
    connections: Connections = DEFAULT_CONNECTIONS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, sizes and free space; fetch nothing.")
    ] = False,
) -> None:
    """Fetch what is needed of a BLOOM repo. Running it again goes on where it stopped."""

    def body() -> int:
        from toolkit.download import carry_out, plan_download

        plan = plan_download(repo, directory, revision)
        if dry_run:
            return _print_plan(plan)
        start = time.monotonic()
        with _bars("downloading", plan.work) as progress:
            done = carry_out(plan, progress, connections)
        print(
            f"{done.revision} is in {directory}: {len(done.fetched)} files fetched, {len(done.kept)} kept, every one "
            f"checked against its hash ({_traffic(done.received, done.resumed, time.monotonic() - start)})"
        )
        return 0

    finish(context, body)


def _traffic(received: int, resumed: int, seconds: float) -> str:
    """ "352.49 GB in 8 h 20 min, 11.8 MB/s; 1.20 GB were there already"."""
    from toolkit.terminal import gigabytes

    there = f"; {gigabytes(resumed)} were there already" if resumed else ""
    return _pace(received, seconds) + there


def _pace(count: int, seconds: float) -> str:
    """ "4.93 GB in 10 s, 493 MB/s"."""
    from toolkit.terminal import duration, gigabytes

    rate = f", {count / seconds / 1e6:,.3g} MB/s" if count and seconds else ""
    return f"{gigabytes(count)} in {duration(seconds)}{rate}"


@app.command()
def prepare(
    context: typer.Context,
    repo: Repo,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The prepared directory to make.")],
    revision: Revision = None,
    connections: Connections = DEFAULT_CONNECTIONS,
    lossless: Lossless = False,
) -> None:
    """Download and convert shard by shard. It takes room for two shards beside the result; run it again to go on."""

    def body() -> int:
        from toolkit.prepare import carry_out, plan_preparation
        from toolkit.terminal import gigabytes

        plan = plan_preparation(repo, destination, revision, _coding(lossless))
        print(f"{plan.revision} into {destination}: {_intention(plan)}", file=sys.stderr)
        with _bars("preparing", plan.work) as progress:
            done = carry_out(plan, progress, connections)
        print(
            f"{destination} is complete: {len(done.written)} parts written ({gigabytes(done.bytes_written)}), "
            f"{len(done.kept)} kept; shards: {_traffic(done.received, done.resumed, done.seconds)}"
        )
        return 0

    finish(context, body)


def _coding(lossless: bool) -> str:
    return LOSSLESS if lossless else PLAIN


def _print_plan(plan: Plan) -> int:
    from toolkit.terminal import gigabytes

    for planned in plan.files:
        print(f"{planned.file.size:>15,}  {planned.file.path}{_STATES[planned.state]}")
    print(f"{plan.total:>15,}  bytes in {len(plan.files)} files of {plan.revision}")
    verdict = (
        "it fits" if plan.fits else f"it does not fit: {gigabytes(plan.to_fetch - plan.free)} too little"
    )
    print(
        f"still to fetch: {gigabytes(plan.to_fetch)}, free in {plan.directory}: {gigabytes(plan.free)}: {verdict}"
    )
    return 0 if plan.fits else 1


_STATES = {
    "sound": "  (there)",
    "unchecked": "  (there, to be checked)",
    "partial": "  (begun)",
    "absent": "",
}


def _intention(plan: PreparationPlan) -> str:
    """What is there, what will be made, and what that takes of the disk."""
    from toolkit.terminal import gigabytes

    there, to_make = len(plan.manifest.parts), len(plan.schedule.needs)
    if not to_make:
        return f"all {there} parts are there"
    cut = ", because blocks are cut across shards" if plan.shards_at_a_time > 2 else ""
    about = "" if plan.manifest.coding == PLAIN else "about "
    return (
        f"{there} parts are there, {to_make} to be made; "
        f"{about}{gigabytes(plan.peak_bytes)} of disk at the fullest moment, "
        f"with at most {plan.shards_at_a_time} shards beside the parts{cut}"
    )


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A downloaded checkpoint.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The prepared directory to make.")],
    delete_source: Annotated[
        bool,
        typer.Option("--delete-source", help="Delete each shard once the parts made from it are checked."),
    ] = False,
    lossless: Lossless = False,
) -> None:
    """Re-split a checkpoint, a file for each block. Running it again goes on where it stopped."""

    def body() -> int:
        from toolkit.convert import carry_out, plan_conversion
        from toolkit.terminal import gigabytes

        plan = plan_conversion(source, destination, delete_source=delete_source, coding=_coding(lossless))
        with _bars("converting", plan.work) as progress:
            done = carry_out(plan, progress)
        print(
            f"{destination} is complete: {len(done.written)} parts written "
            f"({_pace(done.bytes_written, done.seconds)}), {len(done.kept)} kept"
            + (f"; {gigabytes(done.bytes_deleted)} of the source deleted" if done.bytes_deleted else "")
        )
        return 0

    finish(context, body)


@app.command()
def verify(
    context: typer.Context,
    directory: Prepared,
    quick: Annotated[bool, typer.Option("--quick", help="Check presence, sizes and headers only.")] = False,
    sample: Annotated[
        str | None, typer.Option(metavar="5%", help="Compare that share of the bytes, chosen at random.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a prepared directory. Exit status: 0 sound, 1 damage found, 2 could not check."""

    def body() -> int:
        start = time.monotonic()
        report = _check(directory, quick, _share(sample))
        if as_json:
            shown = {
                **asdict(report),
                "directory": str(directory),
                "sound": report.sound,
                "share": report.share,
            }
            print(json.dumps(shown))
        else:
            _print_report(report, time.monotonic() - start)
        return 0 if report.sound else 1

    finish(context, body, failure=2)


def _share(text: str | None) -> float | None:
    """ "5%" is 0.05; `BloomdeskError` for anything but a number of percent."""
    if text is None:
        return None
    try:
        return float(text.removesuffix("%")) / 100
    except ValueError:
        raise BloomdeskError(
            f"a sample is a share of the bytes, found {text!r}", "give it as --sample 5%"
        ) from None


def _check(directory: Path, quick: bool = False, sample: float | None = None) -> VerifyReport:
    from toolkit.verify import carry_out, plan_verify

    plan = plan_verify(directory, quick, sample=sample)
    with _bars("verifying", plan.bytes_to_read) as progress:
        return carry_out(plan, progress)


def _damage_lines(report: VerifyReport) -> list[str]:
    return [
        f"{damage.file}{f': {damage.tensor}' if damage.tensor else ''}: {damage.what}"
        for damage in report.damage
    ]


def _print_report(report: VerifyReport, seconds: float) -> None:
    for line in _damage_lines(report):
        print(line)
    for leftover in report.leftovers:
        print(f"{leftover}: left over from an interrupted conversion; the next one replaces it")
    how = f"all of {_pace(report.bytes_read, seconds)}"
    if report.sample is not None:
        how = f"headers and {report.share:.1%} of the bytes at random: {_pace(report.bytes_read, seconds)}"
    if report.quick:
        how = "sizes and headers"
    checked = f"{report.files_checked} files checked ({how})"
    if report.sound:
        print(f"{report.directory} is sound: {checked}")
    else:
        files = len({damage.file for damage in report.damage})
        print(f"{report.directory} is damaged: {files} files, see above; {checked}")
        print(f"  next: bloomdesk repair {report.directory}")


@app.command()
def repair(
    context: typer.Context,
    directory: Prepared,
    source: Annotated[
        Path | None, typer.Option(metavar="SRC", help="The checkpoint it was made from; the Hub if left out.")
    ] = None,
    connections: Connections = DEFAULT_CONNECTIONS,
) -> None:
    """Make what is damaged or missing again. Just that is fetched, from the Hub or from --source."""

    def body() -> int:
        from toolkit import convert, prepare
        from toolkit.repair import forget, plan_from_hub, plan_from_source

        start = time.monotonic()
        report = _check(directory)
        if report.sound:
            _print_report(report, time.monotonic() - start)
            return 0
        for line in _damage_lines(report):
            print(line)
        known = forget(directory, report.damage, source)
        with ExitStack() as stack:
            if source is not None:
                conversion = plan_from_source(directory, source, known)
                progress = stack.enter_context(_bars("repairing", conversion.work))
                written = convert.carry_out(conversion, progress).written
            else:
                preparation = plan_from_hub(directory, known)
                progress = stack.enter_context(_bars("repairing", preparation.work))
                written = prepare.carry_out(preparation, progress, connections).written
        others = {damage.file for damage in report.damage} - set(written)
        print(f"{directory} is whole again: {len(written)} parts and {len(others)} small files made anew")
        return 0

    finish(context, body)


def _bars(verb: str, total: int) -> WorkProgress:
    from toolkit.terminal import WorkProgress

    return WorkProgress(verb, total, sys.stderr)


@app.command()
def export(
    context: typer.Context,
    directory: Prepared,
    destination: Annotated[Path, typer.Argument(metavar="HUB_DIR", help="Where the checkpoint goes.")],
) -> None:
    """Write the standard checkpoint back. It is sharded safetensors, as transformers loads it."""

    def body() -> int:
        from toolkit.export import carry_out, plan_export

        plan = plan_export(directory, destination)
        with _bars("exporting", plan.bytes_to_write) as progress:
            done = carry_out(plan, progress)
        print(
            f"{destination} holds the checkpoint: {len(done.written)} shards written "
            f"({_pace(done.bytes_written, done.seconds)}), {len(done.kept)} kept"
        )
        return 0

    finish(context, body)


@app.command()
def info(context: typer.Context, directory: Prepared, as_json: Json = False) -> None:
    """Say what a prepared directory holds."""

    def body() -> int:
        from toolkit.info import inspect

        found = inspect(directory)
        if as_json:
            print(json.dumps(found.as_json()))
            return 0
        _print_info(found)
        return 0

    finish(context, body)


def _print_info(found: Info) -> None:
    from toolkit.terminal import gigabytes, parameters

    manifest, model = found.manifest, found.manifest.model
    source = manifest.source
    state = (
        "complete"
        if not manifest.missing
        else f"not complete: {len(manifest.missing)} files are still to be made"
    )
    rows = {
        "source": f"{source.repo} at {source.commit}" if source.repo else "a local checkpoint",
        "state": state,
        "model": f"{parameters(found.parameters)}, {model.dtype}",
        "shape": f"{model.n_layer} blocks, hidden size {model.hidden_size:,}, {model.n_head} heads, "
        f"vocabulary {model.vocab_size:,}",
        "files": f"{len(manifest.parts)} parts and {len(manifest.companions)} small files, {gigabytes(found.bytes)}",
        "stored": _stored(found),
        "a pass reads": gigabytes(found.pass_bytes),
        "KV cache": f"{gigabytes(found.kv_cache_bytes_per_token)} for each token of prompt and output",
    }
    for name, value in rows.items():
        print(f"{name:>12}  {value}")


def _stored(found: Info) -> str:
    """ "plain", or "lossless, 0.672 of the 352.49 GB that plain weights take"."""
    from toolkit.terminal import gigabytes

    coding = found.manifest.coding
    if coding == PLAIN:
        return coding
    return f"{coding}, {found.ratio:.3f} of the {gigabytes(found.plain_bytes)} that plain weights take"


@app.command()
def generate(
    context: typer.Context,
    directory: Prepared,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="The text to continue.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help=PROMPTS_HELP)] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE.jsonl", help=OUT_HELP)] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Stop after so many tokens.")
    ] = DEFAULT_NEW_TOKENS,
    ram: Ram = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help=BATCH_HELP, show_default="what the RAM suggests")
    ] = None,
    speculate: Annotated[str, typer.Option(metavar="HOW", help=SPECULATE_HELP)] = DEFAULT_SPECULATION,
    draft: Annotated[Path | None, typer.Option(metavar="DIR", help=DRAFT_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt, printed as it grows, or a file of them. Each token is the likeliest one."""
    finish(
        context,
        lambda: run_generation(
            directory,
            prompt,
            max_new_tokens,
            as_json,
            ram,
            speculate=speculate,
            draft=draft,
            prompts=prompts,
            out=out,
            batch=batch,
        ),
    )


@app.command()
def bench(
    context: typer.Context,
    directory: Prepared,
    ram: Ram = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to time.")] = BENCH_TOKENS,
    prompt_tokens: PromptTokens = BENCH_PROMPT_TOKENS,
    as_json: Json = False,
) -> None:
    """Time a few tokens. They are compared with the least that this machine's disk and memory allow."""
    finish(context, lambda: run_bench(directory, ram, tokens, prompt_tokens, as_json))


@app.command()
def plan(
    context: typer.Context,
    directory: Annotated[
        Path, typer.Argument(metavar="DST", help="A prepared directory, or any on the disk in question.")
    ] = Path(),
    ram: Ram = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of the family, as bloom-7b1.",
            show_default="what DST holds, or bigscience/bloom",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to generate.")] = DEFAULT_NEW_TOKENS,
    prompt_tokens: PromptTokens = BENCH_PROMPT_TOKENS,
    as_json: Json = False,
) -> None:
    """Forecast disk, RAM and seconds a token. Nothing is downloaded; exit status 1 where the disk is too small."""

    def body() -> int:
        from toolkit.room import room_to_prepare

        return run_plan(directory, ram, model, tokens, prompt_tokens, as_json, room_to_prepare)

    finish(context, body)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
