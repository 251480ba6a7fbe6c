"""The `bloomdesk` command: all options of all commands. Heavy imports wait inside the commands."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand
from typer.exceptions import TyperException

from runner.cli import bench as bench_command
from runner.cli import plan as plan_command
from runner.cli.constraint import read_constraint
from runner.cli.generate import GenerateOptions
from runner.cli.generate import generate as run_generate
from runner.cli.guard import Guard, empty_argument, end_process, require_current_directory
from runner.cli.report import print_lines, print_rows, session_rows
from runner.cli.score import ScoreOptions
from runner.cli.score import score as run_score
from runner.errors import BloomdeskError
from runner.format.coded import LOSSLESS, PLAIN
from runner.generation.options import GenerationOptions, Sampling, read_biases
from runner.system.disk import UNKNOWN_SPACE, free_bytes
from toolkit.cli.line import line_of
from toolkit.cli.progress import WorkProgress
from toolkit.cli.report import (
    completed_lines,
    damage_lines,
    download_lines,
    downloaded_lines,
    info_rows,
    intention,
    repair_lines,
    verify_lines,
    written,
)

if TYPE_CHECKING:
    from toolkit.commands.build import BuildPlan, Summary
    from toolkit.commands.verify import VerifyReport
    from toolkit.hub.line import Line

# Set by the script that `bloomdesk --install-completion` gives to a shell.
COMPLETION = "_BLOOMDESK_COMPLETE"
DEBUG = "--debug"


class _Command(TyperCommand):
    """A command that refuses an empty argument, but for PROMPT, and takes --debug, as `bloomdesk` itself does."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        # What follows "--" is text.
        options = args[: args.index("--")] if "--" in args else args
        if DEBUG in options:
            args = [*(word for word in options if word != DEBUG), *args[len(options) :]]
            ctx.obj.debug = True
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        names = {
            param.name: param.metavar if param.param_type_name == "argument" else param.opts[0]
            for param in self.get_params(ctx)
        }
        empty = empty_argument({names[name]: value for name, value in given.items() if name != "prompt"})
        if empty is not None:
            ctx.fail(empty)
        return super().parse_args(ctx, args)


class _Commands(typer.Typer):
    def command(self, name: str | None = None, **options: Any) -> Callable[..., Any]:
        return super().command(name, cls=_Command, **options)


app = _Commands(
    help="Run BLOOM-176B, or any smaller BLOOM, on a desktop: prepare the checkpoint once, then generate from disk.",
    no_args_is_help=True,
    rich_markup_mode=None,  # drawing boxes costs more than all the rest of --help
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Repo = Annotated[str, typer.Argument(metavar="REPO", help="A BLOOM or BLOOMZ on the Hub: bigscience/bloom.")]
Prepared = Annotated[Path, typer.Argument(metavar="DST", help="A prepared directory.")]
NewDirectory = Annotated[Path, typer.Argument(metavar="DST", help="The prepared directory to make.")]
Revision = Annotated[
    str | None,
    typer.Option(
        metavar="R", help="Branch, tag or commit.", show_default="for bigscience/bloom, the pinned commit"
    ),
]
Connections = Annotated[
    int, typer.Option(metavar="N", min=1, max=32, help="Ranges of a file fetched at a time.")
]
DEFAULT_CONNECTIONS = 8
Patience = Annotated[
    str,
    typer.Option(
        metavar="TIME",
        help="Wait out outages of the network or the Hub up to this long, like 90min; 0 ends after a few tries.",
    ),
]
DEFAULT_PATIENCE = "12h"
LimitRate = Annotated[
    str | None,
    typer.Option(
        "--limit-rate",
        metavar="RATE",
        help="Fetch no faster than this, like 20MB/s.",
        show_default="no limit",
    ),
]
Lossless = Annotated[
    bool,
    typer.Option("--lossless", help="Store bfloat16 weights in two thirds of the bytes, every bit the same."),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="bf16|f16|f32",
        help="Round the weights to this.",
        show_default="what transformers would choose",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="A LoRA adapter to merge into the weights.", show_default="none"),
]
Ram = Annotated[
    str | None, typer.Option(metavar="SIZE", help="RAM to use, like 12GB.", show_default="what is free")
]
PromptTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"bloomdesk {importlib.metadata.version('bloomdesk')}")
        raise typer.Exit


@app.callback()
def common_options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    context.obj.debug = debug
    # 1 says that verify found damage, 2 that it could not check.
    context.obj.failure = 2 if context.invoked_subcommand == "verify" else 1
    require_current_directory()


@app.command()
def download(
    repo: Repo,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put it.")],
    revision: Revision = None,
    connections: Connections = DEFAULT_CONNECTIONS,
    patience: Patience = DEFAULT_PATIENCE,
    limit_rate: LimitRate = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show files, sizes and free space; fetch nothing.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Hash the files that are there, too; fetch those that are damaged."),
    ] = False,
) -> int:
    """Fetch what is needed of a BLOOM repo. Running it again resumes."""
    from toolkit.commands.download import carry_out, plan_download

    line = line_of(patience, limit_rate)
    plan = plan_download(repo, directory, revision, line, everything=check)
    if dry_run:
        print_lines(download_lines(plan))
        return 0 if plan.fits and not plan.names("foreign") else 1
    _say_if_space_is_unknown(directory)
    with WorkProgress("downloading", plan.work, received=lambda: line.received) as progress:
        done = carry_out(plan, progress, connections, line)
    print_lines(downloaded_lines(done, directory))
    return 0


@app.command()
def prepare(
    repo: Repo,
    destination: NewDirectory,
    revision: Revision = None,
    connections: Connections = DEFAULT_CONNECTIONS,
    patience: Patience = DEFAULT_PATIENCE,
    limit_rate: LimitRate = None,
    lossless: Lossless = False,
    dtype: Dtype = None,
) -> None:
    """Download and convert shard by shard. It needs space for two shards beside the result; run again, it resumes."""
    from toolkit.commands.prepare import plan_preparation

    line, form = line_of(patience, limit_rate), _form(lossless)
    plan = plan_preparation(repo, destination, revision, form, connections, _dtype(dtype), line=line)
    what = f"{repo} at {plan.manifest.source.commit[:12]} into {destination}"
    print(f"{what}: {intention(plan)}", file=sys.stderr)
    print_lines(completed_lines(destination, _built("preparing", plan, line)))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A downloaded checkpoint.")],
    destination: NewDirectory,
    delete_source: Annotated[
        bool, typer.Option("--delete-source", help="Delete each shard once its parts are checked.")
    ] = False,
    lossless: Lossless = False,
    dtype: Dtype = None,
    adapter: Adapter = None,
) -> None:
    """Split a checkpoint anew, a file for each block. Running it again resumes."""
    from toolkit.commands.convert import plan_conversion

    plan = plan_conversion(
        source,
        destination,
        delete_source=delete_source,
        form=_form(lossless),
        dtype=_dtype(dtype),
        adapter=adapter,
    )
    print_lines(completed_lines(destination, _built("converting", plan)))


@app.command()
def verify(
    directory: Prepared,
    quick: Annotated[bool, typer.Option("--quick", help="Check presence, sizes and headers only.")] = False,
    sample: Annotated[
        str | None, typer.Option(metavar="5%", help="Compare that share of the bytes, chosen at random.")
    ] = None,
    as_json: Json = False,
) -> int:
    """Check every byte of a prepared directory. Exit status: 0 sound, 1 damage found, 2 could not check."""
    start = time.monotonic()
    report = _check(directory, quick, _share(sample))
    if as_json:
        found = {"directory": str(directory), "sound": report.sound, "share": report.share}
        print(json.dumps({**asdict(report), **found}))
    else:
        print_lines(verify_lines(report, time.monotonic() - start))
    return 1 if report.damage else 2 if report.unchecked else 0


@app.command()
def repair(
    directory: Prepared,
    source: Annotated[
        Path | None, typer.Option(metavar="SRC", help="The checkpoint it was made from; the Hub if left out.")
    ] = None,
    connections: Connections = DEFAULT_CONNECTIONS,
    patience: Patience = DEFAULT_PATIENCE,
    limit_rate: LimitRate = None,
    adapter: Adapter = None,
) -> None:
    """Make what is damaged or missing again. Only that is fetched, from the Hub or from --source."""
    from toolkit.commands.repair import repair as mend

    if adapter is not None and source is None:
        raise BloomdeskError("--adapter needs --source: the Hub has no such weights", "give both")
    start = time.monotonic()

    def found(report: VerifyReport) -> None:
        print_lines(damage_lines(report))

    line = line_of(patience, limit_rate)
    done = mend(directory, source, connections, line, adapter=adapter, work=WorkProgress, found=found)
    print_lines(repair_lines(done, time.monotonic() - start))


@app.command()
def export(
    directory: Prepared,
    destination: Annotated[Path, typer.Argument(metavar="HUB_DIR", help="Where the checkpoint goes.")],
) -> None:
    """Write the standard checkpoint back. It is sharded safetensors, as transformers loads it."""
    from toolkit.commands.export import carry_out, plan_export

    plan = plan_export(directory, destination)
    _say_if_space_is_unknown(destination)
    with WorkProgress("exporting", plan.work) as progress:
        done = carry_out(plan, progress)
    for line in done.notes:
        print(line, file=sys.stderr)
    print(f"{destination} holds the checkpoint: {written('shards', done)}")


@app.command()
def info(directory: Prepared, as_json: Json = False) -> None:
    """Say what a prepared directory, or a session, holds."""
    from toolkit.commands.info import inspect

    if (rows := session_rows(directory)) is not None:
        print_rows(rows, as_json=as_json)
        return
    found = inspect(directory)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        print_rows(info_rows(found))


@app.command()
def generate(
    directory: Prepared,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text to continue is in there.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts in place of PROMPT: .txt with one a line, or .jsonl."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Results of --prompts, one a line; run again, it resumes."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="The most new tokens of a prompt.")
    ] = GenerationOptions.max_new_tokens,
    ram: Ram = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Prompts that share a pass.", show_default="what the RAM suggests"),
    ] = None,
    speculate: Annotated[
        str,
        typer.Option(
            metavar="HOW", help="Draft tokens from the text so far (lookup), or off. Changes no token."
        ),
    ] = GenerationOptions.speculate,
    draft: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Draft tokens from a small prepared BLOOM, too. Changes no token."),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T", help="Draw tokens; higher is more daring.", show_default="the likeliest token"
        ),
    ] = Sampling.temperature,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Draw among the K likeliest tokens.", show_default="all")
    ] = Sampling.top_k,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P", help="Draw among the likeliest tokens that have this probability together."
        ),
    ] = Sampling.top_p,
    min_p: Annotated[
        float,
        typer.Option(
            metavar="P", help="Draw among tokens of this fraction of the likeliest one's probability."
        ),
    ] = Sampling.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: less likely are tokens that prompt or text have.")
    ] = Sampling.repetition_penalty,
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Taken from the logits of tokens that the text has.")
    ] = Sampling.presence_penalty,
    frequency_penalty: Annotated[
        float, typer.Option(metavar="X", help="Taken from them as often as the text has them.")
    ] = Sampling.frequency_penalty,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=X", help="Added to the logit of a token id. Repeatable.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Makes a drawn text repeatable.", show_default="drawn and reported"),
    ] = None,
    n: Annotated[int, typer.Option(metavar="N", help="Continuations of each prompt.")] = Sampling.n,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends the text, and is no part of it. Repeatable."),
    ] = None,
    min_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens before the text may end by itself.")
    ] = Sampling.min_new_tokens,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="The end-of-text token ends nothing.")
    ] = Sampling.ignore_eos,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Report log-probabilities, also of the N likeliest tokens; with --json.",
        ),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The output is JSON that fits this schema.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The output matches this regular expression.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The output follows this Lark grammar.")
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep each pass there; run again, it goes on, also with a longer PROMPT."
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Continue a prompt, printed as it grows, or a file of them. Each token is the likeliest one, or drawn."""
    generation = GenerationOptions(max_new_tokens, speculate, draft, batch)
    sampling = Sampling(
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        read_biases(logit_bias or ()),
        seed,
        n,
        tuple(stop or ()),
        min_new_tokens,
        ignore_eos,
        logprobs,
        **read_constraint(json_schema, regex, grammar),
    )
    return run_generate(
        GenerateOptions(
            directory, prompt, prompt_file, prompts, out, ram, as_json, session, generation, sampling
        )
    )


@app.command()
def score(
    directory: Prepared,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .txt, one long text, or a .jsonl of texts.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Scores, one a line; run again, it resumes.")
    ] = None,
    context: Annotated[
        int, typer.Option(metavar="N", help="Tokens of a window of a long text.")
    ] = ScoreOptions.context,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens from one window to the next.", show_default="512"),
    ] = None,
    ram: Ram = None,
    as_json: Json = False,
) -> int:
    """Log-probabilities of given texts: the perplexity of a long one, or a score for each line."""
    return run_score(ScoreOptions(directory, file, out, ram, as_json, context, stride))


@app.command()
def bench(
    directory: Prepared,
    ram: Ram = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens to time.")
    ] = bench_command.DEFAULT_TOKENS,
    prompt_tokens: PromptTokens = bench_command.DEFAULT_PROMPT_TOKENS,
    as_json: Json = False,
) -> int:
    """Time a few tokens. They are compared with the least that this machine's disk and memory allow."""
    return bench_command.bench(directory, ram, tokens, prompt_tokens, as_json=as_json)


@app.command()
def plan(
    directory: Annotated[
        Path, typer.Argument(metavar="DST", help="A prepared directory, or any on the disk in question.")
    ] = Path(),
    ram: Ram = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of the family, like bloom-7b1.",
            show_default="what DST holds, or bigscience/bloom",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens to generate.")
    ] = GenerationOptions.max_new_tokens,
    prompt_tokens: PromptTokens = bench_command.DEFAULT_PROMPT_TOKENS,
    as_json: Json = False,
) -> int:
    """Forecast disk, RAM and seconds a token. Nothing is downloaded; exit status 1 if the disk is too small."""
    from toolkit.commands.schedule import space_to_prepare

    return plan_command.plan(space_to_prepare, directory, ram, model, tokens, prompt_tokens, as_json=as_json)


def _built(verb: str, plan: BuildPlan, line: Line | None = None) -> Summary:
    from toolkit.commands.build import carry_out

    _say_if_space_is_unknown(plan.destination)
    work = WorkProgress(verb, plan.work)
    if line is not None and plan.bytes_to_fetch:
        # Of shards and of the parts made from them, the shards say how far it is: those come at the line's speed.
        work = WorkProgress(
            verb, plan.bytes_to_fetch, only=plan.schedule.shards, received=lambda: line.received
        )
    with work as progress:
        done = carry_out(plan, progress)
    for note in done.notes:
        print(note, file=sys.stderr)
    return done


def _check(directory: Path, quick: bool = False, sample: float | None = None) -> VerifyReport:
    from toolkit.commands.verify import carry_out, plan_verify

    plan = plan_verify(directory, quick, sample=sample)
    with WorkProgress("verifying", plan.bytes_to_read) as progress:
        return carry_out(plan, progress)


def _say_if_space_is_unknown(directory: Path) -> None:
    if free_bytes(directory) == UNKNOWN_SPACE:
        print(f"{directory}: its disk does not say how much is free, so the work begins", file=sys.stderr)


def _form(lossless: bool) -> str:
    return LOSSLESS if lossless else PLAIN


def _dtype(name: str | None) -> str | None:
    """ "bf16" is BF16. Raises `BloomdeskError` for a name that is no dtype's."""
    from toolkit.source.dtype import OPTIONS

    if name is not None and name not in OPTIONS:
        raise BloomdeskError(f"unknown --dtype {name!r}", f"give one of {', '.join(OPTIONS)}")
    return OPTIONS[name] if name is not None else None


def _share(text: str | None) -> float | None:
    """ "5%" is 0.05. Raises `BloomdeskError` for anything but a number of percent."""
    if text is None:
        return None
    try:
        share: float | None = float(text.removesuffix("%")) / 100
    except ValueError:
        share = None
    # 0.05 may be meant as 5%.
    if share is None or (share <= 0.01 and not text.endswith("%") and share > 0):
        raise BloomdeskError(
            f"a sample is a share of the bytes, in percent, found {text!r}", "give it as --sample 5%"
        )
    return share


def run(arguments: Sequence[str]) -> int:
    """Exit status of the command with these arguments."""
    guard = Guard()

    def invoke() -> int:
        if COMPLETION in os.environ:
            # The shell's Tab key: the words come in the environment, too.
            app(prog_name="bloomdesk")
        try:
            with typer.main.get_command(app).make_context("bloomdesk", list(arguments), obj=guard) as context:
                return context.command.invoke(context) or 0
        except typer.Exit as done:
            return done.exit_code
        except TyperException as error:  # of what was typed
            where = getattr(error, "ctx", None)
            hint = f"{where.command_path if where else 'bloomdesk'} --help"
            help_or_error = BloomdeskError(error.format_message(), hint).worded()
            print(help_or_error if arguments else error.format_message(), file=sys.stderr)
            return error.exit_code

    return guard.run(invoke)


def main() -> NoReturn:
    """Run the command of this process, and end with its exit status."""
    end_process(lambda: run(sys.argv[1:]))


if __name__ == "__main__":
    main()
