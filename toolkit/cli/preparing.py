"""The commands that make, check and describe a prepared directory. Heavy imports wait inside them."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from runner.cli.report import print_lines, print_rows, session_rows
from runner.errors import BloomdeskError
from runner.format.coded import PLAIN
from runner.system.disk import UNKNOWN_SPACE, free_bytes
from toolkit.cli.line import line_of
from toolkit.cli.options import (
    DEFAULT_CONNECTIONS,
    DEFAULT_PATIENCE,
    Adapter,
    Also,
    Connections,
    Dtype,
    Form,
    Json,
    LimitRate,
    Lossless,
    NewAlso,
    NewDirectory,
    Patience,
    Prepared,
    Repo,
    Revision,
    Shares,
    SliceOption,
    dtype_of,
    form_of,
    share_of,
    shares_of,
    slice_of,
)
from toolkit.cli.placement import placement_of
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


def prepare(
    repo: Repo,
    destination: NewDirectory,
    revision: Revision = None,
    connections: Connections = DEFAULT_CONNECTIONS,
    patience: Patience = DEFAULT_PATIENCE,
    limit_rate: LimitRate = None,
    form: Form = PLAIN,
    lossless: Lossless = False,
    dtype: Dtype = None,
    slice_: SliceOption = None,
    also: NewAlso = None,
    shares: Shares = None,
    check_whole: Annotated[
        bool,
        typer.Option(
            "--check-whole", help="With --slice: read all of each shard once, and compare its sha256."
        ),
    ] = False,
) -> None:
    """Download and convert shard by shard. It needs space for two shards beside the result; run again, it resumes."""
    from toolkit.commands.prepare import plan_preparation

    line, chosen = line_of(patience, limit_rate), form_of(form, lossless)
    own = slice_of(slice_, shares)
    if check_whole and own is None:
        raise BloomdeskError(
            "--check-whole is for a --slice: whole shards are always checked", "leave it out"
        )
    plan = plan_preparation(
        repo,
        destination,
        revision,
        chosen,
        connections,
        dtype_of(dtype),
        line=line,
        placement=placement_of(destination, own, also or (), shares_of(shares)),
        check_whole=check_whole,
    )
    what = f"{repo} at {plan.manifest.source.commit[:12]} into {destination}"
    print(f"{what}: {intention(plan)}", file=sys.stderr)
    print_lines(completed_lines(destination, _built("preparing", plan, line), plan.slice))


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A downloaded checkpoint.")],
    destination: NewDirectory,
    delete_source: Annotated[
        bool, typer.Option("--delete-source", help="Delete each shard once its parts are checked.")
    ] = False,
    form: Form = PLAIN,
    lossless: Lossless = False,
    dtype: Dtype = None,
    adapter: Adapter = None,
    slice_: SliceOption = None,
    also: NewAlso = None,
    shares: Shares = None,
) -> None:
    """Split a checkpoint anew, a file for each block. Running it again resumes."""
    from toolkit.commands.convert import plan_conversion

    plan = plan_conversion(
        source,
        destination,
        delete_source=delete_source,
        form=form_of(form, lossless),
        dtype=dtype_of(dtype),
        adapter=adapter,
        placement=placement_of(destination, slice_of(slice_, shares), also or (), shares_of(shares)),
    )
    print_lines(completed_lines(destination, _built("converting", plan), plan.slice))


def spread(
    directory: Prepared,
    also: NewAlso = None,
    shares: Shares = None,
) -> None:
    """Spread a prepared directory over several disks. Running it again resumes."""
    from toolkit.commands.spread import carry_out, plan_spread

    given = placement_of(directory, None, also or (), shares_of(shares))
    plan = plan_spread(directory, also or (), shares_of(shares) or given.shares)
    with WorkProgress("spreading", plan.work) as progress:
        done = carry_out(plan, progress)
    for note in done.notes:
        print(note, file=sys.stderr)
    print_lines(completed_lines(directory, done))


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
    report = _check(directory, quick, share_of(sample))
    if as_json:
        found = {"directory": str(directory), "sound": report.sound, "share": report.share}
        print(json.dumps({**asdict(report), **found}))
    else:
        print_lines(verify_lines(report, time.monotonic() - start))
    return 1 if report.damage else 2 if report.unchecked else 0


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


def export(
    directory: Prepared,
    destination: Annotated[Path, typer.Argument(metavar="HUB_DIR", help="Where the checkpoint goes.")],
    also: Also = None,
) -> None:
    """Write the standard checkpoint back. It is sharded safetensors, as transformers loads it."""
    from toolkit.commands.export import carry_out, plan_export

    plan = plan_export(directory, destination, also or (), WorkProgress)
    _say_if_space_is_unknown(destination)
    with WorkProgress("exporting", plan.work) as progress:
        done = carry_out(plan, progress)
    for line in done.notes:
        print(line, file=sys.stderr)
    print(f"{destination} holds the checkpoint: {written('shards', done)}")


def info(directory: Prepared, also: Also = None, as_json: Json = False) -> None:
    """Say what a prepared directory, or a session, holds."""
    from toolkit.commands.info import inspect

    if (rows := session_rows(directory)) is not None:
        print_rows(rows, as_json=as_json)
        return
    found = inspect(directory, also or ())
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        print_rows(info_rows(found))


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
