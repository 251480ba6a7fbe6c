"""The `bloomdesk` command; the only file of the toolkit that prints. Heavy imports wait inside the commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runner.cli.commands import (
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
    print_lines,
)
from runner.cli.commands import bench as run_bench
from runner.cli.commands import generate as run_generation
from runner.cli.commands import plan as run_plan
from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN
from toolkit.cli.report import (
    damage_lines,
    download_lines,
    info_lines,
    intention,
    pace,
    report_lines,
    traffic,
)
from toolkit.cli.terminal import WorkProgress, gigabytes

if TYPE_CHECKING:
    from toolkit.commands.verify import VerifyReport

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
        from toolkit.commands.download import carry_out, plan_download

        plan = plan_download(repo, directory, revision)
        if dry_run:
            print_lines(download_lines(plan))
            return 0 if plan.fits else 1
        start = time.monotonic()
        with _bars("downloading", plan.work) as progress:
            done = carry_out(plan, progress, connections)
        print(
            f"{done.revision} is in {directory}: {len(done.fetched)} files fetched, {len(done.kept)} kept, every one "
            f"checked against its hash ({traffic(done.received, done.resumed, time.monotonic() - start)})"
        )
        return 0

    finish(context, body)


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
        from toolkit.commands.build import carry_out
        from toolkit.commands.prepare import plan_preparation

        plan = plan_preparation(repo, destination, revision, _form(lossless))
        print(f"{plan.source} into {destination}: {intention(plan)}", file=sys.stderr)
        with _bars("preparing", plan.work) as progress:
            done = carry_out(plan, progress, connections)
        print(
            f"{destination} is complete: {len(done.written)} parts written ({gigabytes(done.bytes_written)}), "
            f"{len(done.kept)} kept; shards: {traffic(done.received, done.resumed, done.seconds)}"
        )
        return 0

    finish(context, body)


def _form(lossless: bool) -> str:
    return LOSSLESS if lossless else PLAIN


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
        from toolkit.commands.build import carry_out
        from toolkit.commands.convert import plan_conversion

        plan = plan_conversion(source, destination, delete_source=delete_source, form=_form(lossless))
        with _bars("converting", plan.work) as progress:
            done = carry_out(plan, progress)
        print(
            f"{destination} is complete: {len(done.written)} parts written "
            f"({pace(done.bytes_written, done.seconds)}), {len(done.kept)} kept"
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
            print_lines(report_lines(report, time.monotonic() - start))
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
    from toolkit.commands.verify import carry_out, plan_verify

    plan = plan_verify(directory, quick, sample=sample)
    with _bars("verifying", plan.bytes_to_read) as progress:
        return carry_out(plan, progress)


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
        from toolkit.commands.build import carry_out
        from toolkit.commands.repair import forget, plan_repair

        start = time.monotonic()
        report = _check(directory)
        if report.sound:
            print_lines(report_lines(report, time.monotonic() - start))
            return 0
        print_lines(damage_lines(report))
        plan = plan_repair(directory, forget(directory, report.damage, source), source)
        with _bars("repairing", plan.work) as progress:
            written = carry_out(plan, progress, connections).written
        others = {damage.file for damage in report.damage} - set(written)
        print(f"{directory} is whole again: {len(written)} parts and {len(others)} small files made anew")
        return 0

    finish(context, body)


def _bars(verb: str, total: int) -> WorkProgress:
    return WorkProgress(verb, total, sys.stderr)


@app.command()
def export(
    context: typer.Context,
    directory: Prepared,
    destination: Annotated[Path, typer.Argument(metavar="HUB_DIR", help="Where the checkpoint goes.")],
) -> None:
    """Write the standard checkpoint back. It is sharded safetensors, as transformers loads it."""

    def body() -> int:
        from toolkit.commands.export import carry_out, plan_export

        plan = plan_export(directory, destination)
        with _bars("exporting", plan.bytes_to_write) as progress:
            done = carry_out(plan, progress)
        print(
            f"{destination} holds the checkpoint: {len(done.written)} shards written "
            f"({pace(done.bytes_written, done.seconds)}), {len(done.kept)} kept"
        )
        return 0

    finish(context, body)


@app.command()
def info(context: typer.Context, directory: Prepared, as_json: Json = False) -> None:
    """Say what a prepared directory holds."""

    def body() -> int:
        from toolkit.commands.info import inspect

        found = inspect(directory)
        if as_json:
            print(json.dumps(found.as_json()))
            return 0
        print_lines(info_lines(found))
        return 0

    finish(context, body)


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
        from toolkit.commands.space import space_to_prepare

        return run_plan(directory, ram, model, tokens, prompt_tokens, as_json, space_to_prepare)

    finish(context, body)


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
